"""Rollouts that a caller brings: rewards of every kind, odd numbers of rows, rows that count for nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ftlib.adapters import lora
from ftlib.engine import PPOConfig
from ftlib.errors import DataError, ShapeError
from ftlib.rollouts.rewards import RewardOut
from ftlib.trainers import PPOTrainer
from tests.data.tokenizers_zoo import tiny
from tests.models_zoo import EOS, tiny_model

PROMPTS = [{"prefix_ids": [4, 5, 6 + index], "source": f"prompt {index}"} for index in range(4)]
ROUNDING = 1e-5  # of float32 in another batch, where one step moves a weight by up to 1e-3
QUERIES, RESPONSES = [[4, 5], [4, 6]], [[7, 8], [7, EOS]]


def ppo(**options: Any) -> PPOTrainer:
    torch.manual_seed(0)
    defaults = {"batch_size": 4, "max_new_tokens": 4, "epochs_per_rollout": 2, "critic_warmup": 0}
    config = PPOConfig(progress="off", stop=[EOS], **({"learning_rate": 1e-3} | defaults | options))
    return PPOTrainer(
        tiny_model("llama"),
        PROMPTS,
        reward=lambda prompts, completions: [float(len(ids)) for ids in completions],
        adapter=lora(4),
        config=config,
    )


def weights(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    return trainer.engine.masters.copies()


@pytest.mark.parametrize(
    "reward",
    [torch.tensor([0.5, 1.0]), np.array([0.5, 1.0]), [0.5, 1.0], RewardOut(None, torch.tensor([0.5, 1.0]))],
    ids=["tensor", "array", "list", "RewardOut"],
)
def test_token_rewards_of_every_kind_train_alike(reward):
    expected, found = ppo(), ppo()
    expected.step(QUERIES, RESPONSES, [torch.tensor([0.5, 1.0]), 0.0])
    row = found.step(QUERIES, RESPONSES, [reward, 0.0])
    assert row["loss"] != 0
    for name, value in weights(expected).items():
        assert torch.equal(weights(found)[name], value), name


def test_a_row_without_a_reward_is_left_out_and_counted():
    alone, with_another = ppo(), ppo()
    alone.step(QUERIES[:1], RESPONSES[:1], [1.0])
    row = with_another.step(QUERIES, RESPONSES, [1.0, None])
    assert row["dropped"] == 0.5
    for name, value in weights(alone).items():
        assert torch.equal(weights(with_another)[name], value), name


def test_arguments_of_other_lengths_are_named():
    with pytest.raises(ShapeError, match=r"one item per query \(2\), got 1 rewards, 3 masks"):
        ppo().step(QUERIES, RESPONSES, [1.0], masks=[[True]] * 3)


def test_a_response_without_a_token_is_named_unless_it_is_left_out():
    with pytest.raises(ShapeError, match=r"at least one token in response 1"):
        ppo().step(QUERIES, [RESPONSES[0], []], [1.0, 1.0])
    assert ppo().step(QUERIES, [RESPONSES[0], []], [1.0, None])["dropped"] == 0.5


def test_what_is_no_reward_is_refused_by_row():
    with pytest.raises(DataError, match=r"<reward>:1: expected a number.*got str"):
        ppo().step(QUERIES, RESPONSES, [1.0, "2"])


@pytest.mark.parametrize(("rows", "steps"), [(1, 2), (2, 4), (5, 6)])
def test_fewer_rows_than_minibatches_make_one_each(rows, steps):
    trainer = ppo(minibatches=3)
    row = trainer.step([[4, 5]] * rows, [[7, 8]] * rows, [1.0] * rows)
    assert row["optimizer_steps"] == steps  # two epochs of at most three


def test_rows_cut_off_leave_no_trace_when_they_are_masked():
    ended, cut = ([4, 6], [7, EOS], 1.0), ([4, 5], [7, 8], 5.0)
    alone, beside = ppo(truncation="mask", minibatches=2), ppo(truncation="mask", minibatches=2)
    for trainer, rows in ((alone, [ended]), (beside, [ended, cut])):
        row = trainer.step(*zip(*rows, strict=True))
        assert row["loss"] == row["loss"]  # no step without a token, so no mean of nothing
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(beside)[name], value, rtol=0, atol=ROUNDING)


def test_evaluation_draws_the_same_however_far_training_is():
    trainer = ppo(learning_rate=0.0)
    before = trainer.evaluate(PROMPTS)
    trainer.update(trainer.rollout(PROMPTS))
    state = torch.random.get_rng_state()
    assert trainer.evaluate(PROMPTS) == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_padding_after_the_stop_token_is_refused_by_row():
    with pytest.raises(ShapeError, match=r"response 1 \(counted from 0\).*2 tokens after it, at place 1"):
        ppo().step(QUERIES, [[7, 8], [7, EOS, EOS, EOS]], [1.0, 1.0])


def test_a_further_turn_may_follow_a_stop_token_where_it_was_not_sampled():
    row = ppo().step([[4, 5]], [[7, EOS, 9, 8, EOS]], [1.0], masks=[[True, True, False, True, True]])
    assert row["finished"] == 1.0


@pytest.mark.parametrize(("said", "ended"), [("yes.", 1.0), ("yes", 0.0), (" yes.", 1.0)])
@pytest.mark.parametrize("as_ids", [False, True])
def test_a_stop_string_ends_a_response(said, ended, as_ids):
    tokenizer = tiny()
    trainer = PPOTrainer(
        tiny_model("llama", vocab_size=len(tokenizer)),
        ["Question:"],
        tokenizer=tokenizer,
        reward=lambda prompts, completions: [0.0] * len(completions),
        adapter=lora(4),
        config=PPOConfig(progress="off", stop=["."], batch_size=1, max_new_tokens=4, critic_warmup=0),
    )
    response = tokenizer.encode(said, add_special_tokens=False) if as_ids else said
    assert trainer.step(["Question:"], [response], [1.0])["finished"] == ended
