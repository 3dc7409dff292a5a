"""What a PPO trainer is given: prompts of every form, settings that clash, a sampler that strays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset

from ftlib.adapters import lora
from ftlib.batches import Rollout, Sampling
from ftlib.engine import PPOConfig
from ftlib.errors import ConfigError, DataError
from ftlib.objectives import PPO, SFT
from ftlib.objectives.rollout_rows import examples, to_row
from ftlib.rollouts import FunctionSampler, Sampled
from ftlib.trainers import PPOTrainer
from ftlib.trainers.ppo_inputs import encode_prompts
from tests.models_zoo import EOS, tiny_model


class Letters:
    """An encoder with a token per letter."""

    task = "causal_lm"

    def encode_prompt(self, row: Any) -> list[int]:
        return [ord(letter) - ord("a") + 3 for letter in row["prompt"]]


RECORDS = [{"prompt": "abc", "answer": "d"}, {"prompt": "bc", "answer": "e"}]
IDS = [[3, 4, 5], [4, 5]]


def ppo(prompts: Any = None, **given: Any) -> PPOTrainer:
    torch.manual_seed(0)
    options = {"batch_size": 4, "max_new_tokens": 4, "epochs_per_rollout": 1, "critic_warmup": 0}
    config = PPOConfig(
        progress="off", learning_rate=1e-3, **({"stop": [EOS]} | options | given.pop("config", {}))
    )
    return PPOTrainer(
        tiny_model("llama"),
        ["abc", "bcd", "cd", "d"] if prompts is None else prompts,
        reward=lambda prompts, completions: [float(len(text)) for text in completions],
        adapter=lora(4),
        encoder=Letters(),
        config=config,
        **given,
    )


@pytest.mark.parametrize("make", [list, tuple, Dataset.from_list, pd.DataFrame])
def test_records_of_every_form_are_the_same_prompts(make):
    rows = encode_prompts(make(RECORDS), Letters, "prompts")
    assert [list(row["prefix_ids"]) for row in rows] == IDS
    assert [row["columns"] for row in rows] == [{"answer": "d"}, {"answer": "e"}]


def test_a_file_of_prompts_is_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "abc"}\n{"prompt": "bc"}\n')
    assert [list(row["prefix_ids"]) for row in encode_prompts(Path(path), Letters, "prompts")] == IDS


def test_what_is_no_list_of_prompts_is_refused():
    with pytest.raises(DataError, match="expected a list of prompts, got 'abc'"):
        encode_prompts("abc", Letters, "prompts")
    with pytest.raises(ConfigError, match="IterableDataset"):
        encode_prompts(IterableDataset.from_generator(lambda: iter(RECORDS)), Letters, "prompts")
    with pytest.raises(ConfigError, match="got dict"):
        encode_prompts({"prompt": ["abc"]}, Letters, "prompts")


def test_encoded_examples_serve_as_prompts():
    encoded = [{"prefix_ids": ids, "source": "encoded"} for ids in IDS]
    assert [rollout.prompt_ids.tolist() for rollout in ppo(encoded).rollout(encoded)] == IDS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", "end"),
        ("stop", [np.int64(2)]),
        ("stop", [True]),
        ("eval_batch_size", 2),
        ("value_learning_rate", -1.0),
    ],
)
def test_settings_that_would_mean_something_else_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"PPOConfig: {name}: expected"):
        PPOConfig(**{name: value})


def test_an_objective_of_ones_own_must_fit_the_settings():
    with pytest.raises(ConfigError, match=r"objectives\.PPO\(\.\.\.\), got SFT"):
        ppo(objective=SFT())
    with pytest.raises(ConfigError, match=r"temperature.*got 0\.5"):
        ppo(objective=PPO(temperature=0.5))
    with pytest.raises(ConfigError, match="gamma has no effect"):
        ppo(objective=PPO(), config={"gamma": 0.9})
    assert ppo(objective=PPO(clip=0.1)).objective.clip == 0.1


def straying(off: float) -> FunctionSampler:
    """Claims log-probabilities that are `off` nats below the uniform ones."""

    def draw(prompts: Any, sampling: Sampling, seeds: Any) -> list[Sampled]:
        return [Sampled.of([7, EOS], sampling, logprobs=torch.full((2,), -off)) for _ in prompts]

    return FunctionSampler(draw)


def test_a_sampler_of_another_policy_is_told():
    trainer = ppo(sampler=straying(20.0))
    trainer.update(trainer.rollout(["abc"]))
    assert "sampler" in trainer.health.state_dict()["told"]
    own = ppo()
    row = own.update(own.rollout(["abc", "bc"]))
    assert row["sampler_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert "sampler" not in own.health.state_dict()["told"]


def test_what_the_warnings_compare_with_goes_into_checkpoints():
    trainer, resumed = ppo(), ppo()
    trainer.update(trainer.rollout(["abc", "bc"]))
    state = trainer.stateful_parts()["health"].state_dict()
    assert state["first_length"] > 0
    resumed.stateful_parts()["health"].load_state_dict(dict(state))
    assert resumed.health.state_dict() == state


@pytest.mark.parametrize(("most", "sizes"), [(None, [4]), (8, [2, 2]), (7, [1, 1, 1, 1]), (1, [1, 1, 1, 1])])
def test_completions_of_one_prompt_share_a_group_within_the_budget(most, sizes):
    ids = torch.tensor([7, 8, EOS])
    rollout = Rollout(torch.tensor([4, 5]), ids, torch.ones(3, dtype=torch.bool), True)
    rows = [to_row(rollout, rollout.mask, {"advantages": torch.full((3,), float(i))}, 0.1) for i in range(4)]
    groups = examples(rows, max_tokens=most)
    assert [len(group["continuation_ids"]) for group in groups] == sizes
    assert [group["length"] for group in groups] == [2 + 3 * size for size in sizes]
    assert [float(vector[0]) for group in groups for vector in group["advantages"]] == [0.0, 1.0, 2.0, 3.0]
