from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.data import load_records
from ftlib.data.transforms import decontaminate, normalise
from ftlib.errors import ConfigError, DataError

WORDS = [f"w{i}" for i in range(40)]
HELD_OUT = " ".join(WORDS[:33])  # 21 runs of 13 words
SHORT = " ".join(WORDS[:10])  # 3 runs of 8 words


def texts(*given):
    return load_records([{"text": text} for text in given])


def spelled_out(row, held_out):
    """The share of the rule, over strings."""
    words, mine = normalise(held_out).split(), normalise(row).split()
    length = 13 if len(words) >= 13 else 8
    if len(words) < 8:
        return float(bool(words) and words == mine)
    runs = [{tuple(w[i : i + length]) for i in range(len(w) - length + 1)} for w in (words, mine)]
    return len(runs[0] & runs[1]) / len(runs[0])


# 12 shared words make no run; k words make k - 12; half of 21 is reached with 11 runs, so with 23 words.
@pytest.mark.parametrize(("shared", "contaminated"), [(12, False), (22, False), (23, True), (33, True)])
def test_half_of_the_runs_of_13_words_is_enough(shared, contaminated):
    row = " ".join(["before", *WORDS[:shared], "after"])
    assert decontaminate(texts(row, "clean"), [HELD_OUT], remove=True).report.kept == 2 - contaminated


# 8 words are one run of three, 9 are two.
@pytest.mark.parametrize(("shared", "contaminated"), [(8, False), (9, True)])
def test_shorter_texts_are_compared_by_runs_of_8(shared, contaminated):
    row = " ".join(["before", *WORDS[:shared], "after"])
    assert decontaminate(texts(row, "clean"), [SHORT], remove=True).report.kept == 2 - contaminated


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=30).map(" ".join), min_size=1, max_size=4),
    st.lists(st.lists(st.sampled_from("abc"), max_size=30).map(" ".join), min_size=1, max_size=3),
)
def test_rows_are_those_of_comparing_all_runs(given, held_out):
    rows = [f"row {text}" if not text.strip() else text for text in given]
    left = decontaminate(texts(*rows), held_out, remove=True).records
    assert list(left["text"]) == [row for row in rows if all(spelled_out(row, t) < 0.5 for t in held_out)]


def test_texts_under_8_words_must_be_a_whole_prompt_or_turn():
    rows = load_records(
        [
            {"prompt": "What is two and two?", "completion": "four"},
            {"prompt": "Tell me: what is two and two?", "completion": "four"},
            {"prompt": "Which number is this?", "completion": "What is two and two"},
        ]
    )
    records, report = decontaminate(rows, ["what is TWO and two"], remove=True)
    assert list(records["_source"]) == ["<list>:2", "<list>:3"]
    assert report.steps[0].counts["evaluation texts under 8 words"] == 1


def test_rows_are_reported_and_kept_unless_they_are_to_be_removed(caplog):
    with caplog.at_level(logging.WARNING):
        records, report = decontaminate(texts(HELD_OUT, "clean"), {"mmlu": [HELD_OUT], "arc": ["x", "..."]})
    assert len(records) == 2
    assert not report.dropped
    assert report.steps[0].counts == {
        "contaminated by mmlu": 1,
        "evaluation texts": 3,
        "evaluation texts under 8 words": 1,
        "evaluation texts without words": 1,
    }
    assert report.steps[0].examples == {"contaminated by mmlu": ["<list>:1 holds 100% of mmlu:1"]}
    assert "1 of 2 rows hold an evaluation text" in caplog.text


def test_all_text_of_conversations_counts_and_prompts_of_records_are_looked_for():
    turns = [
        ("system", "x"),
        ("user", "hi"),
        ("assistant", HELD_OUT.upper()),
        ("user", "ok"),
        ("assistant", "y"),
    ]
    chat = load_records([{"messages": [{"role": role, "content": content} for role, content in turns]}])
    evaluation = load_records([{"prompt": HELD_OUT, "completion": "the answer"}])
    assert decontaminate(chat, evaluation, remove=True).report.dropped == {"contaminated by evaluation": 1}
    answers = load_records([{"prompt": "p", "completion": HELD_OUT}])
    assert not decontaminate(texts(HELD_OUT), answers, remove=True).report.dropped


def test_a_stream_gives_the_same_rows_and_report_each_time_it_is_read():
    rows = texts("clean", HELD_OUT, SHORT, "clean")
    mapped = decontaminate(rows, [HELD_OUT, SHORT], remove=True)
    streamed = decontaminate(rows.to_iterable_dataset(num_shards=2), [HELD_OUT, SHORT], remove=True)
    for _ in range(2):
        assert [row["text"] for row in streamed.records] == list(mapped.records["text"]) == ["clean", "clean"]
        assert streamed.report == mapped.report


def test_fingerprints_follow_the_parameters():
    rows = texts("clean", HELD_OUT)
    made = [
        decontaminate(rows, *args, **options).records._fingerprint
        for args, options in [
            (([HELD_OUT],), {}),
            (([SHORT],), {}),
            (({"mmlu": [HELD_OUT]},), {}),
            (([HELD_OUT],), {"remove": True}),
            (([HELD_OUT],), {"share": 0.6}),
        ]
    ]
    assert len({*made, rows._fingerprint}) == 6
    assert made[0] == decontaminate(texts("clean", HELD_OUT), [HELD_OUT]).records._fingerprint


@pytest.mark.parametrize(
    ("evaluation", "options", "message"),
    [
        (["a"], {"share": 0.0}, "share: expected a number > 0 and <= 1"),
        ({}, {}, "expected at least one evaluation set"),
        ("text", {}, "got one text. Put texts in a list"),
        ([{"text": "a"}], {}, "got dict. Load records with load_records"),
    ],
)
def test_what_cannot_be_compared_is_refused(evaluation, options, message):
    with pytest.raises(ConfigError, match=message):
        decontaminate(texts("a"), evaluation, **options)


def test_an_empty_evaluation_set_is_refused():
    with pytest.raises(DataError, match="expected evaluation texts in arc, got none"):
        decontaminate(texts("a"), {"arc": []})
