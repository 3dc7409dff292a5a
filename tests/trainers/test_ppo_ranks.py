"""PPO on two gloo ranks is PPO in one process: completions are shared out, and each is valued once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ftlib.adapters import lora
from ftlib.engine import PPOConfig
from ftlib.engine.files import load_state, save_state
from ftlib.trainers import PPOTrainer
from tests.models_zoo import EOS, tiny_model
from tests.trainers.processes import ranks

RELATIVE = 1e-4  # float32: sums taken in another order, over three updates
PROMPTS = [{"prefix_ids": [4, 5, 6 + index], "source": f"prompt {index}"} for index in range(5)]


def three_updates(asked: list[int], *, prompts: int, critic: str, warmup: int) -> list[dict[str, Any]]:
    """The rows of three updates; how many completions the reward was asked for goes into `asked`."""

    def reward(prompts: Any, completions: Any, *, completion_ids: list[list[int]]) -> list[float]:
        asked.append(len(completions))
        return [sum(ids) % 7 / 7 for ids in completion_ids]

    torch.manual_seed(0)  # of the adapters' initialisation
    config = PPOConfig(
        progress="off",
        batch_size=2 * prompts,
        samples_per_prompt=2,
        epochs_per_rollout=2,
        max_new_tokens=4,
        max_steps=3,
        log_steps=1,
        learning_rate=1e-3,
        critic_warmup=warmup,
        stop=[EOS],
    )
    trainer = PPOTrainer(
        tiny_model("llama"), PROMPTS[:prompts], reward=reward, adapter=lora(4), critic=critic, config=config
    )
    return trainer.train().history


def three_updates_on_a_rank(rank: int, folder: Path, options: dict[str, Any]) -> None:
    asked: list[int] = []
    history = three_updates(asked, **options)
    save_state(folder / f"{rank}.json", {"asked": asked, "history": history})


CASES = {
    "head": {"prompts": 5, "critic": "head", "warmup": 0},
    "head, warmed up alone": {"prompts": 5, "critic": "head", "warmup": 2},
    "critic of its own": {"prompts": 5, "critic": "adapter", "warmup": 1},
    "fewer prompts than ranks": {"prompts": 1, "critic": "head", "warmup": 0},
}
TOLD = ("loss", "score", "kl", "dropped", "grad_norm", "explained_variance", "completion_tokens")


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_process_and_ask_for_each_reward_once(tmp_path, case):
    """P19."""
    ranks(three_updates_on_a_rank, tmp_path, CASES[case], folder=tmp_path)
    asked: list[int] = []
    expected = three_updates(asked, **CASES[case])
    found = [load_state(tmp_path / f"{rank}.json") for rank in range(2)]
    assert sum(found[0]["asked"]) + sum(found[1]["asked"]) == sum(asked)
    for rank in found:
        for row, one in zip(rank["history"], expected, strict=True):
            for name in TOLD:
                assert row[name] == pytest.approx(one[name], rel=RELATIVE, abs=1e-6), name
