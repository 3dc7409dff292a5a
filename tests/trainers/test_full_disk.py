"""A checkpoint that cannot be written: an error, or a warning and another try when the next one is due."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from ftlib.engine.manifest import newest_valid
from ftlib.errors import CheckpointError, ConfigError
from ftlib.trainers import snapshot
from tests.trainers.processes import ranks
from tests.trainers.runs import DATA, RISING, STEPS, assert_same, run
from tests.trainers.tiny import sft, trained

PLAN = {"adapter": "lora dropout", "save_steps": 2, "keep_checkpoints": 10}


def fill_disk(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for the checkpoints of these steps: each begins, and fails half written."""
    write = snapshot.write

    def full(folder: Path, engine: Any, sampler: Any, boundary: Any, *rest: Any) -> None:
        write(folder, engine, sampler, boundary, *rest)
        if boundary.counters.step in steps:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshot, "write", full)


class Keep(TrainerCallback):
    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.look()


def saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_training_ends_where_a_checkpoint_cannot_be_written(tmp_path, monkeypatch):
    fill_disk({4}, monkeypatch)
    with pytest.raises(CheckpointError, match=r"step 4, .*No space left"):
        run(tmp_path, **PLAN)
    assert saved(tmp_path) == ["checkpoint-00000002"]


@pytest.mark.parametrize("failing", [{2}, {4}, {STEPS}, {2, 4, STEPS}])
def test_training_goes_on_past_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch, caplog, failing):
    fill_disk(failing, monkeypatch)
    found = run(tmp_path, on_save_error="warn", **PLAN)
    assert_same(found, run(None, adapter="lora dropout"))
    assert found.result.stopped_by is None
    assert saved(tmp_path) == [f"checkpoint-{step:08d}" for step in (2, 4, STEPS) if step not in failing]
    for step in failing:
        assert f"no checkpoint of step {step}, training goes on" in caplog.text
    assert "Free some space" in caplog.text


@pytest.mark.parametrize("failing", ["all", "the best", "the one before the best"])
def test_the_best_weights_come_back_from_disk_or_memory(tmp_path, monkeypatch, failing):
    weights: list[dict[str, torch.Tensor]] = []
    keep = Keep(lambda: weights.append(trained(trainer)))
    trainer = sft(data=DATA, callbacks=[keep], **(RISING | {"load_best": False, "metric_for_best": None}))
    losses = [row["eval_loss"] for row in trainer.train().history if "eval_loss" in row]
    best = losses.index(min(losses))  # of the evaluations after each step
    assert 1 < best < len(losses) - 1
    fill_disk({"all": set(range(99)), "the best": {best + 1}}.get(failing, {best}), monkeypatch)
    found = run(tmp_path, on_save_error="warn", **RISING)
    assert found.result.metrics["best_step"] == best + 1
    assert all(torch.equal(value, weights[best][name]) for name, value in found.weights.items())


def test_without_a_folder_there_is_nothing_to_warn_of():
    with pytest.raises(ConfigError, match="on_save_error has no effect without a folder"):
        sft(on_save_error="warn")


def full_disk_on_a_rank(rank: int, folder: Path, policy: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fill_disk({2}, patch)
        trainer = sft(output_dir=folder / "run", save_steps=2, max_steps=3, on_save_error=policy)
        if policy == "warn":
            assert trainer.train().metrics["steps"] == 3
        else:
            with pytest.raises(CheckpointError, match=r"step 2, .*No space left"):
                trainer.train()


@pytest.mark.parametrize(("policy", "newest"), [("raise", None), ("warn", 3)])
def test_every_rank_hears_of_it(tmp_path, policy, newest):
    ranks(full_disk_on_a_rank, tmp_path, policy, folder=tmp_path)
    found = newest_valid(tmp_path / "run").manifest
    assert (None if found is None else found["step"]) == newest
