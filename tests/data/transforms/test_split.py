from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlib.data import load_records, split
from ftlib.data.transforms import normalise
from ftlib.errors import ConfigError, DataError


def pairs(count, prompt="question {}"):
    return load_records([{"prompt": prompt.format(i), "completion": f"answer {i}"} for i in range(count)])


def classes(counts):
    rows = [{"text": f"{name} {i}", "label": name} for name, count in counts.items() for i in range(count)]
    return load_records(rows)


def test_every_row_lands_on_one_side_in_input_order():
    records = pairs(200)
    train, valid = split(records, validation=0.3)
    sources = records["_source"]
    places = [[sources.index(source) for source in side["_source"]] for side in (train, valid)]
    assert sorted(places[0] + places[1]) == list(range(200))
    assert places == [sorted(side) for side in places]
    assert 30 < len(valid) < 90  # binomial(200, 0.3): mean 60, standard deviation 6.5


def test_appended_rows_move_no_earlier_row():
    before = set(split(pairs(60))[1]["prompt"])
    after = set(split(pairs(100))[1]["prompt"])
    assert before == {prompt for prompt in after if int(prompt.split()[1]) < 60}


def test_prompts_that_differ_in_case_and_punctuation_stay_together():
    rows = [
        {"prompt": p.format(i), "completion": "a"} for i in range(40) for p in ("What is {}?", "what IS {}")
    ]
    train, valid = split(load_records(rows))
    sides = [{normalise(prompt) for prompt in side["prompt"]} for side in (train, valid)]
    assert not sides[0] & sides[1]


def test_conversations_are_grouped_by_the_turns_before_the_answer():
    def chat(answer):
        return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]}

    other = {"messages": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "x"}]}
    train, valid = split(load_records([chat("a"), chat("b"), other]), validation=0.5)
    assert sorted((len(train), len(valid))) == [1, 2]


def test_a_column_can_be_the_group():
    rows = [{"text": f"t{i}", "module": f"m{i % 7}"} for i in range(70)]
    train, valid = split(load_records(rows), group="module", validation=0.4)
    assert not set(train["module"]) & set(valid["module"])


@pytest.mark.parametrize("validation", [1e-9, 1 - 1e-9])
def test_an_empty_side_takes_the_nearest_group(validation):
    train, valid = split(pairs(5), validation=validation)
    assert {len(train), len(valid)} == {1, 4}


def test_strata_get_rows_by_largest_remainder():
    """20 % of 10, 7 and 3: quotas 2, 1.4 and 0.6; 20 - floor(16) = 4 rows, so the last one goes to c."""
    _, valid = split(classes({"a": 10, "b": 7, "c": 3}), stratify="label")
    assert Counter(valid["label"]) == {"a": 2, "b": 1, "c": 1}


def test_rare_classes_stand_on_both_sides():
    train, valid = split(classes({"a": 96, "b": 2, "c": 2}), stratify="label", validation=0.01)
    assert set(train["label"]) == set(valid["label"]) == {"a", "b", "c"}


@given(
    sizes=st.lists(st.integers(2, 12), min_size=1, max_size=4), share=st.sampled_from([0.1, 0.2, 0.5, 0.9])
)
def test_every_class_of_two_groups_is_on_both_sides(sizes, share):
    counts = {f"c{i}": size for i, size in enumerate(sizes)}
    train, valid = split(classes(counts), stratify="label", validation=share)
    assert Counter(train["label"]) + Counter(valid["label"]) == Counter(counts)
    assert set(train["label"]) == set(valid["label"]) == set(counts)


def test_seeds_give_other_sides():
    assert split(pairs(100), seed=0)[1]["prompt"] != split(pairs(100), seed=1)[1]["prompt"]


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ConfigError, match="0 < validation < 1, got 1"):
        split(pairs(4), validation=1.0)
    with pytest.raises(DataError, match="at least two groups by 'prompt', got 1 in 3 rows"):
        split(pairs(3, prompt="same"))
    with pytest.raises(DataError, match="expected a column 'topic', found") as caught:
        split(pairs(3), group="topic")
    assert caught.value.code == "missing_column"
