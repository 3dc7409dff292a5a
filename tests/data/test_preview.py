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


# --- snapshots of the three surfaces ---

WEIGHTED = [
    {"role": "user", "content": "the quick"},
    {"role": "assistant", "content": "brown fox", "weight": 0.25},
    {"role": "user", "content": "says"},
    {"role": "assistant", "content": "yes", "weight": 1.0},
]
MIXED = {"prompt": "שלום 世界 ", "completion": "😀<b>\u202e\x1b[2J"}
BOX = (
    "<div dir='auto' style='white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;"
    "border-left:3px solid #888;padding-left:8px;margin:4px 0 12px'>"
)


def weighted():
    encoder = Encoder(tiny(template="llama_marked"), train_on="weighted")
    return encoder.preview(load_records([{"messages": WEIGHTED}]))


def test_the_text_of_weighted_turns():
    assert weighted().text == (
        "--- <list>:1: 15 tokens, 5 trained (33%), stop token trained\n"
        "<s>[INST] the quick [/INST][[ brown fox</s>]][INST] says [/INST][[ yes</s>]]"
    )


def test_a_terminal_shows_the_weight_as_the_shade(monkeypatch):
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert str(weighted()).split("\n")[1] == (
        "<s>[INST] the quick [/INST]\x1b[97;48;5;22m[[ brown fox</s>]]\x1b[0m"
        "[INST] says [/INST]\x1b[97;48;5;34m[[ yes</s>]]\x1b[0m"
    )


def test_a_notebook_shows_the_weight_as_the_shade_and_on_hover():
    """Opacity is 0.25 + 0.35 w: 0.34 for a quarter, 0.60 for one."""
    page = weighted()._repr_html_()
    assert page.startswith(
        "<p><span style='background:rgba(60,160,80,0.60);text-decoration:underline'>Underlined"
    )
    assert page.endswith(
        "<p><b>&lt;list&gt;:1: 15 tokens, 5 trained (33%), stop token trained</b></p>"
        f"{BOX}&lt;s&gt;[INST] the quick [/INST]"
        "<span title='weight 0.25' style='background:rgba(60,160,80,0.34);text-decoration:underline'>"
        " brown fox&lt;/s&gt;</span>[INST] says [/INST]"
        "<span title='weight 1' style='background:rgba(60,160,80,0.60);text-decoration:underline'>"
        " yes&lt;/s&gt;</span></div>"
    )


def test_a_program_gets_ids_tokens_weights_and_spans():
    (row,) = Encoder(tiny("words")).preview([{"prompt": "the quick", "completion": "brown fox"}]).to_dict()
    backend = tiny("words")
    assert row == {
        "source": "<list>:1",
        "ids": backend.convert_tokens_to_ids(["the", "quick", "brown", "fox", "</s>"]),
        "tokens": ["the", "quick", "brown", "fox", "</s>"],
        "weights": [0.0, 0.0, 1.0, 1.0, 1.0],
        "spans": [["the quick", 0.0], [" brown fox </s>", 1.0]],
        "answers": [],
        "heading": "<list>:1: 5 tokens, 3 trained (60%), stop token trained",
    }


def test_wide_and_right_to_left_text_on_every_surface(monkeypatch):
    """Direction overrides and terminal escapes are named: neither may disguise what is trained."""
    shown = Encoder(tiny()).preview(load_records([MIXED]))
    completion = "😀<b><U+202E><U+001B>[2J</s>"
    assert shown.text.split("\n")[1] == f"שלום 世界 [[{completion}]]"
    assert f">{html.escape(completion)}</span></div>" in shown._repr_html_()
    assert f"{BOX}שלום 世界 <span" in shown._repr_html_()
    assert shown.to_dict()[0]["spans"][1][0] == MIXED["completion"] + "</s>"
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert str(shown).count("\x1b") == 2


def test_a_token_that_splits_a_character_shows_the_gap():
    """The emoji is four bytes, one token each; two of them fit."""
    cut = preview([{"text": "a😀b"}], max_length=3, overflow="truncate")
    assert cut.text.endswith("truncated\n[[a\ufffd]]")
    assert preview([{"text": "a😀b"}]).text.endswith("[[a😀b</s>]]")


def test_a_token_of_ten_kilobytes_is_one_token_on_every_surface(monkeypatch):
    word = "x" * 10_000
    backend = tiny("words")
    backend.add_tokens([word])
    shown = Encoder(backend).preview([{"prompt": "the", "completion": word}])
    assert shown.text == f"--- <list>:1: 3 tokens, 2 trained (67%), stop token trained\nthe[[ {word} </s>]]"
    assert shown.to_dict()[0]["tokens"] == ["the", word, "</s>"]
    assert f"> {word} &lt;/s&gt;</span>" in shown._repr_html_()


def test_control_tokens_that_people_wrote_are_told():
    injected = [{"prompt": "a <|im_end|>", "completion": "b"}]
    assert "control-token text kept as text" in preview(injected).text
    assert "control-token" not in preview().text
