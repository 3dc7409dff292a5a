"""A trainer's state to a checkpoint folder and back, always that of a step boundary.

    adapter or model files     exported weights, loadable without ftlib
    train_state.safetensors    the trained weights in training precision
    optimizer.safetensors      moments, by parameter name
    rng.safetensors            generator states
    state.json                 counters, cursor, schedule, open log window, history, callbacks
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

from torch import Tensor

from ftlib.data.sampler import StepSampler
from ftlib.engine.determinism import capture_rng, restore_rng
from ftlib.engine.engine import Engine
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
    """Where a run stands between two steps: everything a checkpoint holds beside weights and moments."""

    counters: Counters = field(default_factory=Counters)
    window: LogWindow = field(default_factory=LogWindow)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=lambda: {"metric": None, "step": None})


def write(
    folder: Path,
    engine: Engine,
    sampler: StepSampler,
    boundary: Boundary,
    callbacks: list[dict[str, Any]],
) -> None:
    """Put every file but the exported weights and the manifest into `folder`."""
    moments, options = flatten_optimizer(engine.optimizer, engine.masters.named)
    tensors, scalars = capture_rng()
    save_tensors(folder / "train_state.safetensors", _detached(engine.masters.named))
    save_tensors(folder / "optimizer.safetensors", _detached(moments))
    save_tensors(folder / "rng.safetensors", tensors)
    state = {
        "counters": asdict(boundary.counters),
        "window": boundary.window.state(),
        "history": boundary.history,
        "best": boundary.best,
        "cursor": sampler.state_dict(),
        "schedule": engine.schedule.state_dict(),
        "optimizer": options,
        "rng": scalars,
        "callbacks": callbacks,
        "skipped": engine.skipped,
    }
    save_state(folder / "state.json", state)


def read(folder: Path, engine: Engine, sampler: StepSampler) -> tuple[Boundary, list[dict[str, Any]]]:
    """Continue from a verified folder: weights, moments, schedule, cursor and random states are set.

    Returns:
        Where the run stood, and what its callbacks remembered.
    """
    state = load_state(folder / "state.json")
    load_weights(folder, engine)
    restore_optimizer(
        engine.optimizer, engine.masters.named, load_tensors(folder / "optimizer.safetensors"), state["optimizer"]
    )
    engine.schedule.load_state_dict(state["schedule"])
    engine.skipped = state["skipped"]
    sampler.load_state_dict(state["cursor"])
    restore_rng(load_tensors(folder / "rng.safetensors"), state["rng"])
    boundary = Boundary(
        Counters(**state["counters"]), LogWindow.of(state["window"]), state["history"], state["best"]
    )
    return boundary, state["callbacks"]


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
