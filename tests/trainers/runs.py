"""A short run of two epochs with warm-up, logging and evaluation: made, stopped, resumed, compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftlib.trainers import SFTTrainer, TrainResult
from tests.trainers.tiny import At, rows, sft, trained, without_clock

__all__ = ["CUTS", "DATA", "EVAL", "RISING", "STEPS", "WAYS", "Run", "assert_same", "run", "stop_after"]

DATA, EVAL = rows(10), rows(3, seed=1)
STEPS = 6  # two epochs of 4 + 4 + 2 examples
CUTS = {"1": 1000, "3": 30, "unequal": 22}  # max_tokens for about so many micro-batches a step
WAYS: dict[str, dict[str, Any]] = {
    "lora dropout": {"adapter": "lora dropout"},
    "full": {"adapter": "full"},
    "full bfloat16": {"adapter": "full", "dtype": torch.bfloat16},
}

RISING = {  # the whole of ten rows in every step: soon they are learned by heart, and others suffer
    "batch_size": 10,
    "max_steps": 12,
    "eval_steps": 1,
    "eval_data": EVAL,
    "schedule": "constant",
    "learning_rate": 5e-3,
    "warmup": 0.0,
    "metric_for_best": "loss",
    "load_best": True,
}


class Run(NamedTuple):
    """One `train()`: the trainer, what it trained, and what it returned."""

    trainer: SFTTrainer
    weights: dict[str, Tensor]
    result: TrainResult


def run(folder: Path | None, *, resume: Any = None, **options: Any) -> Run:
    """Train the short run, or go on with it. Logged every two steps, evaluated every three."""
    defaults = {"epochs": 2, "warmup": 2, "log_steps": 2, "eval_steps": 3, "data": DATA, "eval_data": EVAL}
    trainer = sft(output_dir=folder, **(defaults | options))
    result = trainer.train(resume=resume)
    return Run(trainer, trained(trainer), result)


def stop_after(step: int) -> At:
    """A callback that ends training at the end of a step."""
    return At("on_step_end", step, lambda control: setattr(control, "should_training_stop", True))


def assert_same(found: Run, expected: Run) -> None:
    """Bit-equal weights and masters, and equal logs."""
    assert without_clock(found.result.history) == without_clock(expected.result.history)
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        assert torch.equal(found.weights[name], value), name
