from __future__ import annotations

import logging
from collections import Counter

import pytest

from ftlib.data import Encoder, LabelledEncoder, audit, load_records
from ftlib.data.report import Report
from ftlib.errors import ConfigError
from tests.data.tokenizers_zoo import tiny


def pairs(*given):
    return load_records([{"prompt": prompt, "completion": completion} for prompt, completion in given])


def audited(records, **options):
    encoder = Encoder(tiny(), max_length=20, overflow="drop")
    encoder(records, **options)
    return encoder.report


def test_examples_of_equal_ids_are_counted_after_the_first():
    assert audited(pairs(("q", "a"), ("q", "a"), ("q", "b"), ("q", "a"))).duplicates == 2
    assert audited(pairs(("q", "a"), ("q", "b"))).duplicates == 0


def test_where_the_prompt_ends_and_what_is_trained_tells_examples_apart():
    assert audited(pairs(("ab", "c"), ("a", "bc"))).duplicates == 0
    chats = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": weight}]
        for weight in (1.0, 0.5)
    ]
    assert audited(load_records([{"messages": chat} for chat in chats])).duplicates == 0
    assert audited(load_records([{"messages": chats[0]} for _ in chats])).duplicates == 1


def test_labels_and_margins_tell_examples_apart():
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert audited(load_records([{**pair, "margin": margin} for margin in (1.0, 2.0, 1.0)])).duplicates == 1
    encoder = LabelledEncoder(tiny())
    encoder([{"text": "fine", "label": label} for label in ("good", "bad", "good")])
    assert encoder.report.duplicates == 1


def test_rows_that_are_dropped_are_no_duplicates():
    long = "x" * 100
    assert audited(pairs(("q", long), ("q", long), ("q", "a"))).duplicates == 0


@pytest.mark.parametrize("bos", [False, True])
def test_overlap_counts_prompts_that_stand_in_the_other_data(bos):
    encoder = Encoder(tiny(bos=bos))
    train = encoder(pairs(("q1", "a"), ("q2", "b")))
    assert encoder.report.overlap is None
    encoder(pairs(("q1", "other"), ("q3", "a"), ("q2", "b")), against=train)
    assert encoder.report.overlap == 2


@pytest.mark.parametrize("bos", [False, True])
def test_without_prompts_whole_texts_are_compared(bos):
    encoder = Encoder(tiny(bos=bos))
    train = encoder(load_records([{"text": "one"}, {"text": "two"}]))
    encoder(load_records([{"text": "two"}, {"text": "three"}]), against=train)
    assert encoder.report.overlap == 1
    train = encoder(pairs(("", "one"), ("", "two")))
    encoder(pairs(("", "two"), ("", "three"), ("", "three")), against=train)
    assert encoder.report.overlap == 1


def test_overlap_sees_through_selections_and_batches():
    encoder = Encoder(tiny())
    train = encoder(pairs(*((f"q{i}", "a") for i in range(2500)))).select(range(1, 2500, 2))
    encoder(pairs(*((f"q{i}", "b") for i in range(0, 2500, 5))), against=train)
    assert encoder.report.overlap == 250  # the odd multiples of 5 below 2,500


def test_each_kind_of_red_flag_is_logged_once(caplog):
    encoder = Encoder(tiny())
    with caplog.at_level(logging.WARNING, logger="ftlib"):
        train = encoder(pairs(("q", "a"), ("q", "a"), ("r", "b")))
        encoder(pairs(("q", "b"), ("q", "b")), against=train)
    assert [record.getMessage().split(".")[0] for record in caplog.records] == [
        "Encoder: 1 of 3 examples that repeat an earlier one",
        "Encoder: 2 of 2 examples whose prompt stands in the other data, too",
    ]
    assert encoder.report.flags() == [
        "1 of 2 examples that repeat an earlier one",
        "2 of 2 examples whose prompt stands in the other data, too",
    ]


def test_dropped_examples_are_counted_among_those_that_came():
    report = Report(examples=0, dropped=Counter(too_long=1))
    assert report.flags() == ["1 of 1 examples dropped"]


def test_the_report_shows_what_was_found():
    report = audited(pairs(("q", "a"), ("q", "a")))
    assert "  duplicates: 1" in str(report).splitlines()
    assert report.to_dict()["duplicates"] == 1
    assert "overlap" not in str(report)


def test_workers_and_caches_change_nothing(tmp_path):
    records = pairs(*((f"q{i % 3}", "a") for i in range(8)))
    assert audited(records) == audited(records) == audited(records, num_proc=2)


def test_a_stream_counts_duplicates_within_each_reading():
    records = pairs(*((f"q{i % 40}", "a") for i in range(100)))
    encoder = Encoder(tiny())
    stream = encoder(records.to_iterable_dataset())
    list(stream)
    assert encoder.report == audited(records)
    list(stream)
    assert (encoder.report.duplicates, encoder.report.rows) == (2 * 60, 2 * 100)
    with pytest.raises(ConfigError, match="against has no effect on a stream"):
        encoder(records.to_iterable_dataset(), against=Encoder(tiny())(records))


def test_evaluation_data_that_are_trained_on_are_warned_of(caplog):
    encoder = Encoder(tiny())
    train, shared, apart = (
        encoder(pairs(*given))
        for given in ((("q1", "a"), ("q2", "b")), (("q1", "c"), ("q3", "d")), (("q4", "a"),))
    )
    with caplog.at_level(logging.WARNING, logger="ftlib.data.audit"):
        audit.warn_of_overlap(train, apart)
        audit.warn_of_overlap(list(train), shared)
        assert not caplog.records
        audit.warn_of_overlap(train, shared)
    assert "1 of 2 evaluation examples have a prompt" in caplog.text
