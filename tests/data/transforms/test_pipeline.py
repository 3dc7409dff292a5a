from __future__ import annotations

from functools import partial

import pytest

from ftlib.data import Encoder, load_records, split
from ftlib.data.transforms import deduplicate, filter, pipeline  # noqa: A004
from ftlib.errors import ConfigError
from tests.data.tokenizers_zoo import tiny

ROWS = [{"prompt": "q", "completion": f"answer {i % 7}"} for i in range(30)]


def is_even(row):
    return int(row["completion"].split()[1]) % 2 == 0


def even(records, **options):
    return filter(records, is_even, reason="odd", **options)


def test_a_filter_keeps_what_it_accepts_and_counts_the_rest():
    records, report = even(load_records(ROWS))
    assert set(records["completion"]) == {"answer 0", "answer 2", "answer 4", "answer 6"}
    assert (report.rows, report.kept, report.dropped) == (30, len(records), {"odd": 30 - len(records)})
    assert report.steps[0].examples["odd"][:2] == ["<list>:2", "<list>:4"]


@pytest.mark.parametrize("workers", [None, 1, 4])
def test_workers_change_neither_rows_nor_report_nor_fingerprint(workers):
    alone, made = even(load_records(ROWS)), even(load_records(ROWS), num_proc=workers)
    assert made.records[:] == alone.records[:]
    assert made.report == alone.report
    assert made.records._fingerprint == alone.records._fingerprint


def test_rows_come_without_null_keys_in_messages():
    asked = {"role": "user", "content": "hi"}
    chats = [
        {"messages": [asked, {"role": "assistant", "content": "a", "name": "Eve"}]},
        {"messages": [asked, {"role": "assistant", "content": "b"}]},
    ]
    seen = []
    filter(load_records(chats), lambda row: seen.append(row["messages"]) or True, reason="none")
    assert seen == [chat["messages"] for chat in chats]


def test_a_pipeline_is_its_transforms_one_after_the_other():
    clean = pipeline(even, partial(deduplicate, match="normalised"))
    records, report = clean(load_records(ROWS))
    assert list(records["completion"]) == ["answer 0", "answer 2", "answer 4", "answer 6"]
    assert [step.name for step in report.steps] == ["filter", "deduplicate"]
    assert (report.rows, report.kept) == (30, 4)
    assert report.dropped.total() == 26
    report.check()
    assert report.to_dict()["steps"][1]["dropped"] == {"duplicate": report.steps[1].rows - 4}
    one_by_one = deduplicate(even(load_records(ROWS)).records, match="normalised").records
    assert records._fingerprint == one_by_one._fingerprint


def test_pipelines_compose():
    inner = pipeline(even)
    nested, flat = pipeline(inner, deduplicate), pipeline(even, deduplicate)
    assert nested(load_records(ROWS)).report == flat(load_records(ROWS)).report


def test_a_streamed_pipeline_gives_the_same():
    clean = pipeline(even, deduplicate)
    mapped, streamed = clean(load_records(ROWS)), clean(load_records(ROWS).to_iterable_dataset())
    for _ in range(2):
        assert list(streamed.records) == list(mapped.records)
        assert streamed.report == mapped.report


def test_what_comes_out_is_split_and_encoded_like_any_records():
    records, _ = pipeline(even, deduplicate)(load_records(ROWS))
    train, valid = split(records, group="completion", validation=0.5)
    assert len(train) + len(valid) == len(Encoder(tiny())(records)) == 4


def test_fingerprints_follow_the_function_and_the_reason():
    records = load_records(ROWS)
    made = [
        even(records).records._fingerprint,
        filter(records, is_even, reason="not even").records._fingerprint,
        filter(records, lambda row: True, reason="odd").records._fingerprint,
        records._fingerprint,
    ]
    assert len(set(made)) == 4


def test_what_makes_no_sense_is_refused():
    records = load_records(ROWS)
    with pytest.raises(ConfigError, match="expected a reason in words"):
        filter(records, is_even, reason=" ")
    with pytest.raises(ConfigError, match="num_proc has no effect on a stream"):
        filter(records.to_iterable_dataset(), is_even, reason="odd", num_proc=2)
    with pytest.raises(ConfigError, match="expected at least one transform"):
        pipeline()
    with pytest.raises(ConfigError, match="got tuple from <function split"):
        pipeline(partial(split, group="completion").func)(load_records([{"text": f"t{i}"} for i in range(9)]))
