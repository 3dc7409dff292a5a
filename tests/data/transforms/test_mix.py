from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.data import load_records
from ftlib.data.transforms import mix
from ftlib.errors import ConfigError, DataError


def source(name, count):
    return load_records([{"text": f"{name} {i}"} for i in range(count)])


def taken(records):
    return [row["text"] for row in records]


def of(name, texts):
    return [int(text.split()[1]) for text in texts if text.split()[0] == name]


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 5), stop=st.sampled_from(["first", "all", "once"]), data=st.data())
def test_rows_come_in_order_and_the_stop_policy_holds(sizes, seed, stop, data):
    sources = {f"s{i}": source(f"s{i}", size) for i, size in enumerate(sizes)}
    weights = {name: data.draw(st.sampled_from([0.5, 1.0, 3.0])) for name in sources}
    records, report = mix(sources, weights=weights, seed=seed, stop=stop)
    report.check()
    whole = []
    for (name, rows), size in zip(sources.items(), sizes, strict=True):
        numbers = of(name, taken(records))
        assert numbers == [i % len(rows) for i in range(len(numbers))]
        assert report.steps[0].counts[f"from {name}"] == len(numbers)
        assert report.added[f"{name} repeated"] == max(len(numbers) - size, 0)
        assert report.dropped[f"{name} not reached"] == max(size - len(numbers), 0)
        whole.append(len(numbers) >= size)
        if stop != "all":
            assert len(numbers) <= size
    assert any(whole) if stop == "first" else all(whole)


@settings(max_examples=20, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 3), stop=st.sampled_from(["first", "all", "once"]))
def test_a_stream_gives_the_same_rows_each_time_it_is_read(sizes, seed, stop):
    sources = {f"s{i}": source(f"s{i}", size) for i, size in enumerate(sizes)}
    streams = {name: rows.to_iterable_dataset() for name, rows in sources.items()}
    mapped = mix(sources, seed=seed, stop=stop)
    streamed = mix(streams, seed=seed, stop=stop)
    for _ in range(2):
        assert list(streamed.records) == list(mapped.records)
        assert streamed.report.added == mapped.report.added
        assert streamed.report.steps[0].counts == mapped.report.steps[0].counts
        streamed.report.check()


def test_weights_are_met_on_average():
    """Binomial(4000, 3/4) has mean 3000 and standard deviation 27."""
    sources = {"a": source("a", 4000), "b": source("b", 4000)}
    records = mix(sources, weights={"a": 3.0, "b": 1.0}).records.select(range(4000))
    assert abs(len(of("a", taken(records))) - 3000) < 5 * 27


def test_the_seed_decides_and_the_fingerprint_follows_the_parameters():
    sources = {"a": source("a", 20), "b": source("b", 20)}
    assert taken(mix(sources, seed=1).records) == taken(mix(sources, seed=1).records)
    assert taken(mix(sources, seed=1).records) != taken(mix(sources, seed=2).records)
    made = [
        mix(sources, **options).records._fingerprint
        for options in ({}, {"seed": 1}, {"stop": "once"}, {"weights": {"a": 2, "b": 1}})
    ]
    made.append(mix({"b": sources["b"], "a": sources["a"]}).records._fingerprint)
    assert len(set(made)) == 5


def test_sources_and_their_rows_stay_as_they_were():
    rows = source("a", 5)
    before = (rows._fingerprint, rows[:])
    mix({"a": rows, "b": source("b", 3)}, stop="all")
    assert (rows._fingerprint, rows[:]) == before


def test_a_column_that_a_source_lacks_is_null():
    more = load_records([{"text": f"b {i}", "topic": "x"} for i in range(3)])
    records = mix({"a": source("a", 3), "b": more}, stop="once").records
    assert Counter(records["topic"]) == {"x": 3, None: 3}


@pytest.mark.parametrize(
    ("sources", "options", "error", "message"),
    [
        ({}, {}, ConfigError, "expected a dict of one source by name"),
        ({"a": [1]}, {}, ConfigError, "mix: a: expected a datasets.Dataset"),
        (
            {"a": source("a", 2)},
            {"weights": {"b": 1}},
            ConfigError,
            r"a weight for each of \['a'\], got \['b'\]",
        ),
        (
            {"a": source("a", 2)},
            {"weights": {"a": 0}},
            ConfigError,
            r"expected weights above 0, got \{'a': 0\}",
        ),
        ({"a": source("a", 2)}, {"stop": "never"}, ConfigError, "mix: stop: expected one of"),
        (
            {"a": source("a", 2).select([])},
            {},
            DataError,
            r"expected rows in every source, got none in \['a'\]",
        ),
        (
            {"a": source("a", 2), "b": source("b", 2).to_iterable_dataset()},
            {},
            ConfigError,
            "expected data sets or streams, got both",
        ),
        (
            {"a": source("a", 2), "b": load_records([{"prompt": "p", "completion": "c", "text": 3}])},
            {},
            DataError,
            None,
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(sources, options, error, message):
    if message is None:
        sources = {"a": sources["a"], "b": sources["b"].rename_column("extra_text", "text")}
        message = "expected columns of one name to have one type"
    with pytest.raises(error, match=message):
        mix(sources, **options)
