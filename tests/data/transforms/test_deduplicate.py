from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.data import load_records
from ftlib.data.transforms import deduplicate, normalise
from ftlib.errors import ConfigError, DataError

LONG = " ".join(f"w{i}" for i in range(44))


def rows(*completions, prompt="q"):
    return load_records([{"prompt": prompt, "completion": completion} for completion in completions])


def kept(records, **options):
    return list(deduplicate(records, **options).records["completion"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["a", "A!", " a", "b", "B", "c d"]), min_size=1))
def test_the_first_of_each_kind_stays_in_order(completions):
    assert kept(rows(*completions)) == list(dict.fromkeys(completions))
    first = {}
    for completion in completions:
        first.setdefault(normalise(completion), completion)
    assert kept(rows(*completions), match="normalised") == list(first.values())


def test_near_duplicates_are_those_of_prompt_and_completion():
    near = f"{LONG} more"
    assert kept(rows(LONG, near, "other")) == [LONG, near, "other"]
    assert kept(rows(LONG, near, "other"), match="near") == [LONG, "other"]
    assert kept(rows(LONG, LONG.upper()), match="near") == [LONG]


def test_every_row_is_counted_and_duplicates_are_named():
    records, report = deduplicate(rows("a", "b", "a", "a"))
    assert (report.rows, report.kept, dict(report.dropped)) == (4, 2, {"duplicate": 2})
    assert report.steps[0].examples == {"duplicate": ["<list>:3 repeats row 1", "<list>:4 repeats row 1"]}
    assert str(report) == "deduplicate: 4 rows -> 2\n  dropped, duplicate: 2"
    assert len(records) == 2


def test_only_twenty_are_named_and_all_are_counted():
    report = deduplicate(rows(*["a"] * 50)).report
    assert len(report.steps[0].examples["duplicate"]) == 20
    assert report.dropped["duplicate"] == 49


def test_labels_system_texts_and_rejected_answers_tell_rows_apart():
    labelled = load_records([{"text": LONG, "label": label} for label in ("good", "bad", "good")])
    assert list(deduplicate(labelled, match="near").records["label"]) == ["good", "bad"]
    assert list(deduplicate(labelled).records["label"]) == ["good", "bad"]
    pair = [{"prompt": "q", "chosen": LONG, "rejected": "no way at all, I would say"}]
    swapped = {"prompt": "q", "chosen": pair[0]["rejected"], "rejected": LONG}
    assert len(deduplicate(load_records([*pair, swapped]), match="near").records) == 2
    assert len(deduplicate(load_records([*pair, *pair]), match="near").records) == 1

    def chat(system):
        turns = [("system", system), ("user", LONG), ("assistant", "a")]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    assert len(deduplicate(load_records([chat("Be kind."), chat("Be rude.")]), match="near").records) == 2


def test_other_columns_do_not_make_rows_different():
    given = [{"prompt": "q", "completion": "a", "id": i} for i in range(3)]
    assert list(deduplicate(load_records(given)).records["id"]) == [0]
    assert list(deduplicate(load_records(given), columns=["id"]).records["id"]) == [0, 1, 2]
    with pytest.raises(DataError, match=r"expected the columns \['topic'\]") as caught:
        deduplicate(load_records(given), columns=["topic"])
    assert caught.value.code == "missing_column"


@pytest.mark.parametrize("match", ["exact", "normalised"])
def test_a_stream_gives_the_same_rows_and_report_each_time_it_is_read(match):
    records = rows("a", "b", "A", "a", "c", "b")
    mapped = deduplicate(records, match=match)
    streamed = deduplicate(records.to_iterable_dataset(), match=match)
    for _ in range(2):
        assert [row["completion"] for row in streamed.records] == list(mapped.records["completion"])
        assert streamed.report == mapped.report


def test_streams_that_cannot_be_deduplicated_are_refused_by_name():
    records = rows(*"abcd")
    with pytest.raises(ConfigError, match='match="near" looks at all rows'):
        deduplicate(records.to_iterable_dataset(), match="near")
    with pytest.raises(ConfigError, match="expected a stream of one shard, got 2"):
        deduplicate(records.to_iterable_dataset(num_shards=2))
    with pytest.raises(ConfigError, match=r"expected a datasets\.Dataset or IterableDataset, got list"):
        deduplicate([{"text": "a"}])
    with pytest.raises(ConfigError, match="expected match as one of"):
        deduplicate(records, match="fuzzy")


def test_a_stream_that_is_resumed_in_the_middle_is_refused():
    stream = deduplicate(rows(*"abcdef").to_iterable_dataset()).records
    state = None
    for number, _ in enumerate(stream):
        if number == 2:
            state = stream.state_dict()
            break
    fresh = deduplicate(rows(*"abcdef").to_iterable_dataset()).records
    fresh.load_state_dict(state)
    with pytest.raises(ConfigError, match="Read the stream from its start"):
        list(fresh)


def test_the_input_stays_as_it_was_and_fingerprints_follow_the_parameters():
    records = rows("a", "A", "a")
    before = (records._fingerprint, records[:])
    made = [
        deduplicate(records, **options).records._fingerprint
        for options in ({}, {"match": "normalised"}, {"match": "near"}, {"columns": ["prompt"]})
    ]
    assert len({*made, before[0]}) == 5
    assert made[0] == deduplicate(rows("a", "A", "a")).records._fingerprint
    assert (records._fingerprint, records[:]) == before
