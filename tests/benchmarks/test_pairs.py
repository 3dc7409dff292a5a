"""Preference pairs as both sides must hold them, and what would make the sides differ."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from benchmarks.recorder import IGNORED, example_sha256
from benchmarks.sides import examples_of
from benchmarks.tasks import dpo, reward
from benchmarks.tasks.pairs import with_rejected
from ftlib.data.collate import collate

PAD, EOS = 0, 2
PAIR = {"prompt_ids": [5, 6], "chosen_ids": [7, EOS], "rejected_ids": [8, 9, EOS]}
OTHER = {"prompt_ids": [7], "chosen_ids": [9, 9, 9, EOS], "rejected_ids": [5, EOS]}
CHOSEN, REJECTED = [5, 6, 7, EOS], [5, 6, 8, 9, EOS]


def encoded(pair):
    prompt, *answers = pair.values()
    return {
        "prefix_ids": prompt,
        "prefix_weights": [0.0] * len(prompt),
        "continuation_ids": answers,
        "continuation_weights": [[1.0] * len(ids) for ids in answers],
    }


def padded(rows, value):
    return torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=value
    )


def trl_batch(pad):
    """As TRL collates the two pairs: chosen rows, then rejected rows, padded on the right."""
    pairs = (PAIR, OTHER)
    parts = [(pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in pairs]
    return {
        "input_ids": padded([[*prompt, *answer] for prompt, answer in parts], pad),
        "attention_mask": padded([[1] * len([*prompt, *answer]) for prompt, answer in parts], 0),
        "completion_mask": padded([[0] * len(prompt) + [1] * len(answer) for prompt, answer in parts], 0),
    }


def hashes(examples):
    return list(map(example_sha256, examples))


def test_dpo_labels_every_token_of_both_answers():
    x = IGNORED
    assert dpo.labelled(PAIR) == [(CHOSEN, [x, x, 7, EOS]), (REJECTED, [x, x, 8, 9, EOS])]


def test_reward_labels_the_token_that_is_scored():
    x = IGNORED
    assert reward.labelled(PAIR) == [(CHOSEN, [x, x, x, EOS]), (REJECTED, [x, x, x, x, EOS])]


@pytest.mark.parametrize("task", [dpo, reward])
def test_a_pair_whose_answers_are_swapped_is_another_example(task):
    swapped = PAIR | {"chosen_ids": PAIR["rejected_ids"], "rejected_ids": PAIR["chosen_ids"]}
    assert example_sha256(task.labelled(PAIR)) != example_sha256(task.labelled(swapped))


def test_packed_groups_are_read_back_as_rows():
    batch = collate([encoded(PAIR), encoded(OTHER)])
    assert examples_of(batch) == [dpo.labelled(PAIR), dpo.labelled(OTHER)]


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_padded_dpo_rows_are_read_back_whatever_pads_them(pad):
    assert hashes(dpo.unpadded(trl_batch(pad))) == hashes(map(dpo.labelled, (PAIR, OTHER)))


def test_padded_reward_rows_are_read_back():
    assert hashes(reward.unpadded(trl_batch(PAD), pad=PAD)) == hashes(map(reward.labelled, (PAIR, OTHER)))


def test_padding_with_the_terminator_is_noticed():
    """The model would then score the token before it."""
    (chosen, _), _ = reward.unpadded(trl_batch(EOS), pad=EOS)
    assert chosen == (CHOSEN, [IGNORED, IGNORED, 7, IGNORED])


def tokenizer_that_merges():
    """Characters, but a line break and the a after it are one token."""
    vocabulary = {text: i for i, text in enumerate(["<pad>", "<bos>", "<eos>", "q", "\n", "a", "b", "\na"])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE(vocab=vocabulary, merges=[("\n", "a")])),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    )


@pytest.mark.parametrize(("chosen", "ids", "same"), [("b", [6, EOS], True), ("a", [5, EOS], False)])
def test_text_that_is_tokenised_across_the_boundary_is_not_the_same(chosen, ids, same):
    pair = {
        "prompt": "q\n",
        "chosen": chosen,
        "rejected": "bb",
        "prompt_ids": [3, 4],
        "chosen_ids": ids,
        "rejected_ids": [6, 6, EOS],
    }
    assert dpo.same_in_trl(tokenizer_that_merges(), pair) is same


def test_rows_are_padded_with_a_token_that_none_holds():
    tokenizer = tokenizer_that_merges()
    assert reward.unused_token(tokenizer, [{"chosen_ids": [3, EOS]}]) == "<pad>"
    tokenizer.pad_token = tokenizer.eos_token
    assert reward.unused_token(tokenizer, [{"chosen_ids": [3, EOS]}]) == "<bos>"
    with pytest.raises(ValueError, match="no row holds"):
        reward.unused_token(tokenizer, [{"chosen_ids": [1, EOS]}])


def test_the_stand_in_for_a_rejected_answer_is_that_of_another_row():
    rows = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(5)]
    assert [row["rejected"] for row in with_rejected(rows)] == ["c2", "c3", "c4", "c0", "c1"]
