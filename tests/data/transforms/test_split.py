from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.data import load_records, split
from ftlib.data.transforms import membership, normalise
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


@settings(deadline=None)
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
    with pytest.raises(ConfigError, match="split: validation: expected a number > 0 and < 1, got 1"):
        split(pairs(4), validation=1.0)
    with pytest.raises(DataError, match="at least two groups by 'prompt', got 1 in 3 rows"):
        split(pairs(3, prompt="same"))
    with pytest.raises(DataError, match="expected a column 'topic', found") as caught:
        split(pairs(3), group="topic")
    assert caught.value.code == "missing_column"


QUESTION = "Please tell me at length how the colour printer on the second floor is reset by {} after a jam"


def test_near_duplicates_of_one_prompt_stay_together():
    """Of 20 words, a word more at the end leaves 16 of 17 runs: 0.941."""
    rows = [
        {"prompt": f"{QUESTION.format(f'user{i}')}{more}", "completion": "a"}
        for i in range(40)
        for more in ("", " twice", "?")
    ]
    sides = split(load_records(rows), group="near", validation=0.4)
    users = [{prompt.split()[16] for prompt in side["prompt"]} for side in sides]
    assert users[0]
    assert users[1]
    assert not users[0] & users[1]
    by_prompt = split(load_records(rows), group="prompt", validation=0.4)
    users = [{prompt.split()[16] for prompt in side["prompt"]} for side in by_prompt]
    assert users[0] & users[1]


def test_near_groups_are_stable_when_rows_are_appended():
    rows = [
        {"prompt": f"{QUESTION.format(f'user{i % 30}')} {'twice' if i % 2 else ''}", "completion": "a"}
        for i in range(80)
    ]
    before = split(load_records(rows[:50]), group="near")[1]["_source"]
    after = split(load_records(rows), group="near")[1]["_source"]
    assert list(before) == [source for source in after if int(source.split(":")[1]) <= 50]


def test_a_shared_system_text_does_not_make_prompts_near_duplicates():
    system = {"role": "system", "content": " ".join(f"rule{i}" for i in range(200))}
    rows = [
        {
            "messages": [
                system,
                {"role": "user", "content": f"{i}"},
                {"role": "assistant", "content": "a"},
            ]
        }
        for i in range(40)
    ]
    train, valid = split(load_records(rows), group="near")
    assert len(train) > len(valid) > 1


def test_legacy_membership_is_the_old_permutation():
    """n_train = floor(0.8 * 7) = 5; the rest of the file in its order."""
    train, valid = split(pairs(7), method="legacy")
    drawn = np.random.RandomState(42).permutation(7).tolist()
    assert [int(prompt.split()[1]) for prompt in train["prompt"]] == drawn[:5]
    assert [int(prompt.split()[1]) for prompt in valid["prompt"]] == sorted(drawn[5:])


@pytest.mark.parametrize("option", [{"seed": 1}, {"group": "near"}, {"stratify": "completion"}])
def test_legacy_refuses_options_that_it_does_not_heed(option):
    with pytest.raises(ConfigError, match=rf"does not heed \['{next(iter(option))}'\]"):
        split(pairs(5), method="legacy", **option)
    with pytest.raises(ConfigError, match="expected method as None or"):
        split(pairs(5), method="new")


def test_a_stream_is_refused_by_name():
    with pytest.raises(ConfigError, match="got IterableDataset, whose end is not known"):
        split(pairs(5).to_iterable_dataset())


@settings(deadline=None)
@given(st.lists(st.text(max_size=8), min_size=2, unique_by=normalise), st.integers(0, 3), st.randoms())
def test_in_any_order_a_prompt_falls_on_the_same_side(prompts, seed, random):
    shuffled = random.sample(prompts, len(prompts))
    held = dict(zip(prompts, membership.by_hash(prompts, 0.5, seed), strict=True))
    assert held == dict(zip(shuffled, membership.by_hash(shuffled, 0.5, seed), strict=True))


@settings(deadline=None)
@given(
    sizes=st.dictionaries(st.sampled_from("abcd"), st.integers(2, 30), min_size=1),
    share=st.sampled_from([0.1, 0.2, 1 / 3, 0.5]),
)
def test_without_groups_of_several_rows_the_quotas_are_met(sizes, share):
    """Largest remainder: each class within one row of its share, and the sum as it must be."""
    labels = [name for name, size in sizes.items() for _ in range(size)]
    groups = [str(row) for row in range(len(labels))]
    held = membership.by_class(groups, labels, share, seed=0)
    taken = Counter(label for label, is_held in zip(labels, held, strict=True) if is_held)
    least = Counter(sizes.keys())  # one row of each class, whatever its share
    for label, size in sizes.items():
        assert taken[label] == least[label] or abs(taken[label] - share * size) < 1
    if all(size * share >= 1 for size in sizes.values()):
        assert taken.total() == membership.validation_rows(len(labels), share)


def test_a_number_of_validation_rows_is_a_fraction():
    labels = ["a"] * 700 + ["b"] * 301
    held = membership.by_class([str(row) for row in range(1001)], labels, Fraction(200, 1001), seed=0)
    assert sum(held) == 200


def test_a_group_counts_to_its_most_frequent_label():
    """Group g holds 3 a and 1 b, so its four rows are a's; b has its quota from its own groups."""
    groups = ["g"] * 4 + [f"a{i}" for i in range(4)] + [f"b{i}" for i in range(8)]
    labels = ["a", "a", "a", "b", *["a"] * 4, *["b"] * 8]
    held = membership.by_class(groups, labels, 0.5, seed=0)
    assert sum(is_held for group, is_held in zip(groups, held, strict=True) if group[0] == "b") == 4


def test_the_share_is_taken_as_written():
    """(1 - 0.9) * 10 is 0.9999999999999998 in binary fractions."""
    assert membership.validation_rows(10, 0.9) == 9
    assert membership.validation_rows(1000, 0.2) == 200
