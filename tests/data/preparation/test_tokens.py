"""What a tokenizer changes: lengths are counted, and defaults follow its habits."""

from __future__ import annotations

import pytest

from ftlib.data import prepare
from tests.data.preparation.harness import pairs
from tests.data.tokenizers_zoo import TEMPLATES, tiny

FACTS = [("What does it do?", "It copies a file."), ("Who says yes?", "The quick brown fox says")]
ROWS = [{"prompt": prompt, "completion": completion} for prompt, completion in FACTS]


def length(tokenizer, row):
    return len(tokenizer(row["prompt"] + row["completion"], add_special_tokens=False)["input_ids"])


def test_the_finished_text_is_counted_and_the_longer_row_goes():
    """The limit is the length of the shorter row as it is written, separator and ending included."""
    tokenizer = tiny()
    finished = prepare(ROWS, tokenizer=tokenizer).records
    short, long = sorted(length(tokenizer, row) for row in finished)
    assert short < long
    kept = prepare(ROWS, tokenizer=tokenizer, max_length=long)
    assert "too_long" not in [action.check for action in kept.actions]
    assert kept.report["tokens"]["max"] == long
    assert kept.report["tokens"]["total"] == short + long
    cut = prepare(ROWS, tokenizer=tokenizer, max_length=long - 1)
    (finding,) = (each for each in cut.report["findings"] if each["check"] == "too_long")
    assert (finding["count"], finding["data"]["unit"], finding["data"]["default"]) == (1, "tokens", "on")
    assert len(cut.records) == 1


def test_nothing_is_estimated_where_tokens_are_counted():
    rows = [*ROWS, {"prompt": "é" * 4000, "completion": "yes"}]
    report = prepare(rows, tokenizer=tiny(), max_length=100_000).report
    assert "length_estimate" not in [finding["check"] for finding in report["findings"]]
    assert report["tokens"]["over"] == 0


@pytest.mark.parametrize(
    ("kind", "default"),
    [("byte_level", "on"), ("byte_level_prefix_space", "off"), ("metaspace_first", "off"), ("words", "off")],
)
def test_a_space_of_the_tokenizers_own_needs_no_other(kind, default):
    actions = {action.check: action for action in prepare(ROWS, tokenizer=tiny(kind)).actions}
    assert actions["leading_space"].default == default


@pytest.mark.parametrize("chat", [False, True])
def test_a_chat_model_keeps_long_prefixes(chat):
    tokenizer = tiny()
    tokenizer.chat_template = next(iter(TEMPLATES.values())) if chat else None
    rows = [{**row, "prompt": "Answer in one word: " + row["prompt"]} for row in ROWS]
    actions = {action.check: action for action in prepare(rows, tokenizer=tokenizer).actions}
    assert actions["prompt_prefix"].applied != chat


def test_labels_are_counted_in_tokens():
    rows = [{"prompt": f"{k} ->", "completion": (" yes", " zzyzx")[k % 2]} for k in range(12)]
    report = prepare(rows, tokenizer=tiny()).report
    (finding,) = (each for each in report["findings"] if each["check"] == "label_tokens")
    assert (finding["data"]["unit"], finding["data"]["several"]) == ("tokens", [" zzyzx"])


def test_a_tokenizer_can_be_named(tmp_path):
    tiny().save_pretrained(tmp_path / "tokenizer")
    source = tmp_path / "d.jsonl"
    source.write_text(pairs(*FACTS))
    by_name = prepare(source, tokenizer=str(tmp_path / "tokenizer")).report
    assert by_name["tokens"]["total"] == prepare(source, tokenizer=tiny()).report["tokens"]["total"]
    assert by_name["options"]["tokenizer"] == by_name["tokens"]["by"] == str(tmp_path / "tokenizer")
