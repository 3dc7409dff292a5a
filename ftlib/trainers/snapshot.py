"""A trainer's state to a checkpoint folder and back, always that of a step boundary.

| file | content |
|---|---|
| adapter or model files | exported weights, loadable without ftlib |
| ``train_state.safetensors`` | the trained weights in training precision |
| ``optimizer.safetensors`` | moments, by parameter name |
| ``rng.safetensors`` | generator states of every rank |
| ``state.json`` | counters, cursor, schedule, open log window, history, callbacks |
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

from torch import Tensor

from ftlib.data.sampler import StepSampler
from ftlib.engine.determinism import restore_rng
from ftlib.engine.engine import Engine, RandomState
from ftlib.engine.files import load_state, load_tensors, save_state, save_tensors
from ftlib.engine.optimizer_state import flatten_optimizer, restore_optimizer
from ftlib.engine.window import LogWindow

__all__ = ["Boundary", "Counters", "expected_bytes", "load_weights", "read", "write"]


@final
@dataclass
class Counters:
    """What a run has done so far; goes on through a resume."""

    step: int = 0
    tokens: int = 0
    examples: int = 0
    seconds: float = 0.0


@final
@dataclass
class Boundary:
    """Where a run stands between two steps: what a checkpoint holds beside weights, moments and generators.

    Args:
        counters: done so far.
        window: the steps since the last logged row.
        history: the rows logged.
        best: the best evaluation: its metric and step.
        owing: requests of `TrainerControl` that a stop left open at this boundary.
    """

    counters: Counters = field(default_factory=Counters)
    window: LogWindow = field(default_factory=LogWindow)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=lambda: {"metric": None, "step": None})
    owing: list[str] = field(default_factory=list)


def write(
    folder: Path,
    engine: Engine,
    sampler: StepSampler,
    boundary: Boundary,
    callbacks: Sequence[Mapping[str, Any]],
    random_states: Sequence[RandomState],
) -> None:
    """Put every file but the exported weights and the manifest into `folder`.

    Args:
        folder: an empty one.
        engine: weights, moments and schedule.
        sampler: the data cursor.
        boundary: where the run stands.
        callbacks: what these remember.
        random_states: of every rank, in order.
    """
    moments, options = flatten_optimizer(engine.optimizer, engine.masters.named)
    save_tensors(folder / "train_state.safetensors", _detached(engine.masters.named))
    save_tensors(folder / "optimizer.safetensors", _detached(moments))
    generators = {
        f"rank{rank}/{name}": tensor
        for rank, (tensors, _) in enumerate(random_states)
        for name, tensor in tensors.items()
    }
    save_tensors(folder / "rng.safetensors", generators)
    state = {
        "counters": asdict(boundary.counters),
        "window": boundary.window.state(),
        "history": boundary.history,
        "best": boundary.best,
        "owing": boundary.owing,
        "cursor": sampler.state_dict(),
        "schedule": engine.schedule.state_dict(),
        "optimizer": options,
        "rng": [scalars for _, scalars in random_states],
        "callbacks": callbacks,
        "skipped": engine.skipped,
        "max_tokens": engine.max_tokens,
    }
    save_state(folder / "state.json", state)


def read(
    folder: Path, engine: Engine, sampler: StepSampler, *, changed: bool
) -> tuple[Boundary, list[dict[str, Any]]]:
    """Continue from a verified folder: weights, moments, schedule, cursor and random states are set.

    Args:
        folder: a checkpoint.
        engine: set to its state.
        sampler: likewise.
        changed: the settings are no longer those of the checkpoint, and the present ones count: the
            options of the optimiser stay, and the schedule is run to the checkpoint's step.

    Returns:
        Where the run stood, and what its callbacks remembered.
    """
    state = load_state(folder / "state.json")
    load_weights(folder, engine)
    present = [{**group, "params": None} for group in engine.optimizer.param_groups]
    moments = load_tensors(folder / "optimizer.safetensors")
    restore_optimizer(engine.optimizer, engine.masters.named, moments, state["optimizer"])
    if changed:
        _run_schedule(engine, present, state["schedule"]["last_epoch"])
    else:
        engine.schedule.load_state_dict(state["schedule"])
        engine.max_tokens = state["max_tokens"]  # lower than configured after running out of memory
    engine.skipped = state["skipped"]
    sampler.load_state_dict(state["cursor"])
    _restore_rank(folder, state["rng"], engine.accelerator.process_index)
    boundary = Boundary(
        Counters(**state["counters"]),
        LogWindow.of(state["window"]),
        state["history"],
        state["best"],
        state["owing"],
    )
    return boundary, state["callbacks"]


def _run_schedule(engine: Engine, options: Sequence[Mapping[str, Any]], steps: int) -> None:
    for group, present in zip(engine.optimizer.param_groups, options, strict=True):
        group.update({name: value for name, value in present.items() if name != "params"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch expects a step of the optimiser for each
        for _ in range(steps):
            engine.schedule.step()


def _restore_rank(folder: Path, scalars: Sequence[Mapping[str, Any]], rank: int) -> None:
    """This rank's generators; a rank that the checkpoint does not know keeps its fresh ones."""
    if rank < len(scalars):
        prefix = f"rank{rank}/"
        tensors = load_tensors(folder / "rng.safetensors")
        own = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
        restore_rng(own, scalars[rank])


def load_weights(folder: Path, engine: Engine) -> None:
    """Set the trained weights, and nothing else, to those of a checkpoint."""
    engine.masters.load(load_tensors(folder / "train_state.safetensors"))


def expected_bytes(engine: Engine) -> int:
    """About how much a checkpoint takes: exported weights, masters and two moments each."""
    trained = sum(weight.numel() * weight.element_size() for weight in engine.masters.named.values())
    exported = sum(weight.numel() * weight.element_size() for weight in engine.masters.weights.values())
    return exported + 3 * trained + 2**20


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
