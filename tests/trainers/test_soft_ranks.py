"""Soft prompts on two gloo processes are those of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ftlib.engine.files import load_tensors, save_tensors
from tests.trainers.processes import ranks
from tests.trainers.tiny import rows, sft
from tests.virtual import SOFT

DATA = rows(8)


def three_steps(kind: str) -> dict[str, Tensor]:
    """Gradient descent with momentum, whose steps are linear in the gradient."""
    trainer = sft(
        adapter=SOFT[kind](),
        data=DATA,
        max_tokens=30,
        optimizer=lambda groups, rate: torch.optim.SGD(groups, 0.05, 0.9),
    )
    for _ in range(3):
        trainer.step(DATA)
    return trainer.engine.masters.copies()


def three_steps_on_a_rank(rank: int, kind: str, folder: Path) -> None:
    save_tensors(folder / f"{rank}.safetensors", three_steps(kind))


@pytest.mark.parametrize("kind", ["p-tuning lstm", "prefix projection"])
def test_two_ranks_are_one_process(tmp_path: Path, kind: str) -> None:
    ranks(three_steps_on_a_rank, kind, tmp_path, folder=tmp_path)
    first, second = (load_tensors(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, value in three_steps(kind).items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5 * float(value.abs().max()))
