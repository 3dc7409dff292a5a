"""The report is one file that needs nothing else, shows text as text, and appears whole or not at all."""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pytest

from ftlib.demo.report import Report, _line_chart
from ftlib.errors import ConfigError

LOSS = {"train": [(1.0, 3.0), (2.0, 2.5), (3.0, 2.25)], "eval": [(1.0, 3.1), (3.0, 2.4)]}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def full_report(words: str) -> Report:
    report = Report(words)
    report.section(words)
    report.text(words)
    report.table([{words: words, "loss": 1.5}])
    report.curve({words: [(0.0, 1.0), (1.0, 2.0)]}, words, words)
    report.answers(words, words, words, words)
    return report


def test_every_kind_of_part_shows_its_text_as_text() -> None:
    """Title twice, section, paragraph, header, cell, three labels of the curve, prompt and three answers."""
    page = Page(full_report(HOSTILE).html())
    assert page.text.count(HOSTILE) == 13
    assert not {tag for tag, _ in page.tags} & {"script", "img", "iframe", "object", "base"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_the_page_refers_to_nothing_outside_itself() -> None:
    page = Page(full_report("plain").html())
    links = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in {"src", "href", "xlink:href", "action", "data"}
    ]
    assert all(value is not None and value.startswith("#") for value in links)
    assert "@import" not in full_report("plain").html()
    assert not re.search(r"url\((?!#)", full_report("plain").html())


def test_curve_draws_the_points_it_was_given() -> None:
    axes = _line_chart(LOSS, "step", "loss, nats per token").axes[0]
    drawn = {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axes.lines}
    assert drawn == LOSS
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "loss, nats per token")


def test_series_differ_by_more_than_colour() -> None:
    lines = _line_chart(LOSS, "step", "loss").axes[0].lines
    assert lines[0].get_linestyle() != lines[1].get_linestyle()


def test_two_curves_share_no_id_and_every_reference_has_its_target() -> None:
    report = Report("two")
    report.curve(LOSS, "step", "loss")
    report.curve(LOSS, "step", "loss")
    ids = [attributes["id"] for _, attributes in Page(report.html()).tags if "id" in attributes]
    references = set(re.findall(r'(?:url\(|href=")#([^)"]+)', report.html()))
    assert len(ids) == len(set(ids))
    assert references
    assert references <= set(ids)


def test_the_same_parts_give_the_same_bytes() -> None:
    assert full_report("same").html() == full_report("same").html()


def test_a_dollar_sign_is_not_a_formula() -> None:
    report = Report("prices")
    report.curve({"$x^2$": [(0.0, 1.0)]}, "cost in $", "gain in $")
    assert "$x^2$" in Page(report.html()).text


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    before = (mpl.get_backend(), dict(mpl.rcParams))
    full_report("quiet").html()
    assert (mpl.get_backend(), dict(mpl.rcParams)) == before


def test_numbers_are_rounded_and_aligned_and_words_are_not() -> None:
    report = Report("numbers")
    report.table([{"name": "a", "loss": 1.23456, "tokens": 1234567, "ok": True, "note": "0.123456"}])
    assert '<td class="number">1.235</td><td class="number">1,234,567</td>' in report.html()
    assert "<td>True</td><td>0.123456</td>" in report.html()


def test_paragraphs_are_separated_by_blank_lines() -> None:
    report = Report("text")
    report.text("one\nstill one\n\ntwo\n\n\n")
    assert report.html().count("<p ") == 2


def test_a_table_without_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="got no rows"):
        Report("empty").table([])


def test_a_row_with_other_columns_is_named() -> None:
    with pytest.raises(ConfigError, match=r"columns \['a'\], got row 2 with \['b'\]"):
        Report("odd").table([{"a": 1}, {"b": 1}])


@pytest.mark.parametrize("series", [{}, {"train": []}])
def test_a_curve_without_points_is_refused(series: dict[str, list[tuple[float, float]]]) -> None:
    with pytest.raises(ConfigError, match="expected series with points"):
        Report("empty").curve(series, "step", "loss")


def test_any_text_of_a_model_can_be_written(tmp_path: Path) -> None:
    """Emoji, right-to-left text, NUL, and half of a surrogate pair."""
    report = Report("any")
    report.answers("prompt", "before", "😀 שלום \0 \ud83d")
    text = report.write(tmp_path / "deep" / "report.html").read_text(encoding="utf-8")
    assert "😀 שלום \ufffd" in text
    assert "\0" not in text
    assert r"\ud83d" in text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Report("old").write(tmp_path / "report.html")
    old = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        Report("new").write(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_report_replaces_the_old_one(tmp_path: Path) -> None:
    path = Report("old").write(tmp_path / "report.html")
    assert Report("new").write(path) == path
    assert "<title>new</title>" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]
