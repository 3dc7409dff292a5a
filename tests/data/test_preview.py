from __future__ import annotations

import html
import io
import re

import pytest

from ftlib.data import Encoder, formatters, load_records
from ftlib.errors import DataError
from tests.data.tokenizers_zoo import tiny

ROWS = [
    {"prompt": "the quick ", "completion": "brown fox"},
    {"prompt": "שלום 世界 ", "completion": "😀<b>&</b>"},
]


def preview(rows=ROWS, n=3, **options):
    return Encoder(tiny(), **options).preview(load_records(rows), n=n)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_marks_stand_around_what_is_trained():
    """One token per word: two of the prompt, two of the completion and EOS."""
    shown = Encoder(tiny("words")).preview([{"prompt": "the quick", "completion": "brown fox"}])
    assert shown.text == (
        "--- <list>:1: 5 tokens, 3 trained (60%), stop token trained\nthe quick[[ brown fox </s>]]"
    )


def test_wide_and_right_to_left_text_and_split_characters_come_out_whole():
    assert "שלום 世界 [[😀<b>&</b></s>]]" in preview().text


def test_the_program_s_view_joins_to_the_decoded_row():
    for row in preview().to_dict():
        assert "".join(text for text, _ in row["spans"]) == tiny().decode(row["ids"])
        assert len(row["ids"]) == len(row["tokens"]) == len(row["weights"])


def test_html_escapes_everything_and_needs_no_script():
    page = preview()._repr_html_()
    assert "<b>&</b>" not in page
    assert html.escape("<b>&</b>") in page
    assert "text-decoration:underline" in page
    assert "weight 1" in page
    assert not re.search(r"<script|https?:|src=", page)


@pytest.mark.parametrize("no_color", ["", "1"])
def test_terminals_are_coloured_unless_told_not_to(monkeypatch, no_color):
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setenv("NO_COLOR", no_color)
    shown = str(preview())
    assert ("\x1b[" in shown) == (no_color == "")
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown) == preview().text


def test_pipes_get_plain_text(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert str(preview()) == repr(preview()) == preview().text


def test_headings_warn_of_missing_stops_cuts_and_drops():
    texts = [{"text": "the quick brown fox"}]
    assert "NO stop token trained" in preview(texts, formatter=formatters.text(eos="none")).text
    assert "truncated" in preview(texts, max_length=5, overflow="truncate").text
    assert "DROPPED, too_long" in preview(texts, max_length=5, overflow="drop").text
    with pytest.raises(DataError, match="expected at most 5 tokens"):
        preview(texts, max_length=5)


def test_a_token_of_ten_kilobytes_is_shown():
    row = [{"prompt": "a", "completion": "x" * 10_000}]
    assert "x" * 10_000 in preview(row).text


def test_only_the_first_rows_are_shown():
    assert len(preview(n=1).rows) == 1
    assert len(preview(n=5).rows) == 2
