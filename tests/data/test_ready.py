"""Rows that are token ids or weighted text already keep what they say through the encoder."""

from __future__ import annotations

import pytest

from ftlib.data import Encoder, Segments, collate, load_records
from ftlib.errors import ConfigError, DataError
from tests.data.tokenizers_zoo import tiny

IDS = [5, 6, 7, 8]


def encoded(rows, **options):
    encoder = Encoder(tiny(), **options)
    return encoder, encoder(load_records(rows))


def weights_of(example):
    return [*example["prefix_weights"], *(w for side in example["continuation_weights"] for w in side)]


def ids_of(example):
    return [*example["prefix_ids"], *(i for side in example["continuation_ids"] for i in side)]


@pytest.mark.parametrize(
    ("row", "weights"),
    [
        ({"labels": [-100, -100, 7, 8]}, [0, 0, 1, 1]),
        ({"completion_mask": [0, 1, 1, 1]}, [0, 1, 1, 1]),
        ({"assistant_masks": [0, 1, 0, 1]}, [0, 1, 0, 1]),
        ({"labels": [-100, 6, 7, 8], "assistant_masks": [0, 1, 0, 1]}, [0, 1, 0, 1]),
        ({"labels": [-100, 6, 7, 8], "loss_weights": [1, 0.5, 1, 2]}, [0, 0.5, 1, 2]),
    ],
)
def test_ids_keep_their_weights(row, weights):
    _, data = encoded([{"input_ids": IDS, **row}])
    assert ids_of(data[0]) == IDS
    assert weights_of(data[0]) == weights


def test_encoded_text_is_the_same_when_it_comes_back_as_ids():
    _, first = encoded([{"prompt": "Answer: ", "completion": "yes"}])
    labels = [-100 if not w else i for i, w in zip(ids_of(first[0]), weights_of(first[0]), strict=True)]
    _, again = encoded([{"input_ids": ids_of(first[0]), "labels": labels}])
    for name in ("prefix_ids", "prefix_weights", "continuation_ids", "continuation_weights"):
        assert again[0][name] == first[0][name]


def test_ids_without_weights_are_learned_whole_or_refused():
    with pytest.raises(DataError, match='train_on="all"') as caught:
        encoded([{"input_ids": IDS}] * 2)
    assert caught.value.code == "missing_column"
    _, data = encoded([{"input_ids": IDS}], train_on="all")
    assert weights_of(data[0]) == [1.0] * 4


def test_pairs_of_ids_share_their_prompt():
    encoder, data = encoded([{"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8]}])
    assert (data[0]["prefix_ids"], data[0]["continuation_ids"]) == ([5], [[6, 7], [8]])
    assert (encoder.report.answers, encoder.report.pairs) == (2, 1)
    assert len(collate([data[0]]).targets_N) == 3


def test_ids_that_the_tokenizer_does_not_know_are_refused():
    with pytest.raises(DataError, match="of another tokenizer"):
        encoded([{"input_ids": [5, 10**6], "labels": [5, 10**6]}])


def test_lengths_and_empty_targets_are_checked_as_for_text():
    row = {"input_ids": IDS, "labels": [-100, -100, 7, 8]}
    with pytest.raises(DataError, match="expected at most 3 tokens, got 4"):
        encoded([row], max_length=3)
    _, data = encoded([row], max_length=3, overflow="truncate")
    assert ids_of(data[0]) == IDS[:3]
    with pytest.raises(DataError, match="alone fills max_length=2"):
        encoded([row], max_length=2, overflow="truncate")
    with pytest.raises(DataError, match="every token weighs 0"):
        encoded([{"input_ids": IDS, "labels": [-100] * 4}])


@pytest.mark.parametrize("options", [{"train_on": "last"}, {"prompt_loss_weight": 0.1}])
def test_options_that_need_the_text_are_refused(options):
    with pytest.raises(ConfigError, match="bring their weights"):
        encoded([{"input_ids": IDS, "labels": IDS}], **options)


def test_segments_are_encoded_with_nothing_around_them():
    tokenizer = tiny()
    row = {"segments": [{"text": "Say: ", "label": False}, {"text": "yes", "label": True}]}
    _, data = encoded([row])
    assert tokenizer.decode(ids_of(data[0])) == "Say: yes"
    expected = [tokenizer(text, add_special_tokens=False).input_ids for text in ("Say: ", "yes")]
    assert (data[0]["prefix_ids"], data[0]["continuation_ids"]) == (expected[0], [expected[1]])


def test_weights_of_segments_are_loss_weights():
    parts = [("a ", 0.5), ("b ", 0.0), ("c", 2.0)]
    row = {"data": {"text_list": [text for text, _ in parts], "loss_weights": [w for _, w in parts]}}
    _, data = encoded([row])
    assert sorted(set(weights_of(data[0]))) == [0.0, 0.5, 2.0]


def test_control_tokens_of_segments_are_meant():
    tokenizer = tiny()
    _, data = encoded([{"segments": [{"text": f"yes{tokenizer.eos_token}", "label": True}]}])
    assert ids_of(data[0])[-1] == tokenizer.eos_token_id


def test_judged_completions_are_not_learned_by_mistake():
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    with pytest.raises(DataError, match="Keep the good ones"):
        encoded(rows)
    good = load_records(rows).filter(lambda row: row["label"]).remove_columns("label")
    assert len(Encoder(tiny())(good)) == 1


def test_rows_of_messages_lose_their_null_keys_before_a_formatter_sees_them():
    from ftlib.data import formatters

    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x", "weight": 2}]},
        {
            "messages": [
                {"role": "user", "content": "Hi", "name": "Ann"},
                {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]},
            ]
        },
    ]
    made = [formatters.chat()(row) for row in load_records(rows)]
    assert not isinstance(made[0], Segments)
    assert made[0].messages == (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "x", "weight": 2.0},
    )
    assert made[1].messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert set(made[1].messages[1]) == {"role", "content", "tool_calls"}
