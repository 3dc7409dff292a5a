"""Two gloo processes train on preferences as one does, whatever share each has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ftlib.engine.files import load_state, load_tensors, save_state, save_tensors
from ftlib.trainers import DPOTrainer, RewardTrainer
from tests.seq2seq import t5_model
from tests.trainers.preferences import UNSEEN, pairs, preference_trainer
from tests.trainers.processes import ranks
from tests.trainers.tiny import trained

RELATIVE = 1e-5  # float32: sums taken in another order
SHARES: dict[str, dict[str, Any]] = {
    "dpo": {"kind": DPOTrainer, "data": pairs(8), "max_tokens": 60},
    "dpo, all weights": {"kind": DPOTrainer, "adapter": "full", "data": pairs(5, answers=3), "loss": "ipo"},
    "dpo, fewer pairs than ranks": {"kind": DPOTrainer, "data": pairs(1)},
    "dpo, T5": {"kind": DPOTrainer, "model": t5_model, "data": pairs(8), "max_tokens": 60},
    "reward": {"kind": RewardTrainer, "data": pairs(8), "max_tokens": 60, "center": 0.01},
    "reward, all weights": {"kind": RewardTrainer, "adapter": "full", "data": pairs(5, answers=3)},
    "reward, fewer pairs than ranks": {"kind": RewardTrainer, "data": pairs(1)},
}


def three_steps(share: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Rows, an evaluation, predictions, and weights; plain gradient descent, linear in the gradient."""
    options = {name: value() if name == "model" else value for name, value in SHARES[share].items()}
    trainer = preference_trainer(optimizer=lambda groups, rate: torch.optim.SGD(groups, 0.05), **options)
    steps = [trainer.step(SHARES[share]["data"]) for _ in range(3)]
    told = {"steps": steps, "evaluation": trainer.evaluate(UNSEEN), "predictions": trainer.predict(UNSEEN)}
    return told, trained(trainer)


def three_steps_on_a_rank(rank: int, share: str, folder: Path) -> None:
    told, weights = three_steps(share)
    save_state(folder / f"{rank}.json", told)
    save_tensors(folder / f"{rank}.safetensors", weights)


@pytest.mark.parametrize("share", SHARES)
def test_two_ranks_are_one_process(share: str, tmp_path: Path) -> None:
    ranks(three_steps_on_a_rank, share, tmp_path, folder=tmp_path)
    told, weights = three_steps(share)
    assert told["steps"][-1]["loss"] != told["steps"][0]["loss"]
    for rank in range(2):
        found = load_state(tmp_path / f"{rank}.json")
        for row, expected in zip(found["steps"], told["steps"], strict=True):
            assert row == pytest.approx(expected, rel=RELATIVE, abs=RELATIVE)
        assert found["evaluation"] == pytest.approx(told["evaluation"], rel=RELATIVE, abs=RELATIVE)
        for row, expected in zip(found["predictions"], told["predictions"], strict=True):
            for name, values in expected.items():
                assert row[name] == pytest.approx(values, rel=RELATIVE, abs=RELATIVE)
    first, second = (load_tensors(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, value in weights.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=RELATIVE * float(value.abs().max()))
