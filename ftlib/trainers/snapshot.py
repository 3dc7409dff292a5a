"""A trainer's state to a checkpoint folder and back: that of a step boundary, or inside an update of PPO.

| file | content |
|---|---|
| adapter or model files | exported weights, loadable without ftlib |
| ``train_state.safetensors`` | the trained weights in training precision |
| ``optimizer.safetensors`` | moments, by parameter name |
| ``rng.safetensors`` | generator states of every rank |
| ``parts.safetensors`` | tensors of what else the trainer names, such as a moving reference |
| ``state.json`` | counters, cursor, schedule, open log window, history, callbacks, those parts' values |
| ``rollouts.safetensors``, ``rollouts.json`` | rows of an update that a stop has cut, and its progress |
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

from torch import Tensor

from ftlib.data.sampler import StepSampler
from ftlib.engine.determinism import restore_rng
from ftlib.engine.engine import Engine, RandomState
from ftlib.engine.files import load_state, load_tensors, save_state, save_tensors
from ftlib.engine.optimizer_state import flatten_optimizer, restore_optimizer
from ftlib.engine.window import LogWindow
from ftlib.models.sharding import whole_tensors
from ftlib.trainers.ppo_phase import Phase

__all__ = [
    "Boundary",
    "Counters",
    "Learner",
    "Stateful",
    "Trained",
    "expected_bytes",
    "kept_weights",
    "load_weights",
    "read",
    "write",
]

logger = logging.getLogger(__name__)


@runtime_checkable
class Stateful(Protocol):
    """A part of a run with a state of its own, the same on every rank, that changes only between steps."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors, and values that JSON holds, by name. Tensors stand at the top, not inside values."""

    def load_state_dict(self, state: dict[str, Any], /) -> object:
        """Take such a state over: tensors come bit for bit, on the CPU; tuples come as lists."""


@runtime_checkable
class Learner(Stateful, Protocol):
    """A part that learns beside the model, such as a critic: the best evaluation has weights of it too."""

    def weights(self) -> dict[str, Tensor]:
        """Copies of what is trained, by the names of `state_dict`."""

    def load_weights(self, state: Mapping[str, Any], /) -> None:
        """Take the weights of such a state over, and nothing else."""


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
        owing: what is still to do at this boundary: requests of `TrainerControl`, and "on_epoch_end". Of a
            cut update, what is to do at its end.
        phase: an update that a stop has cut; None between two.
    """

    counters: Counters = field(default_factory=Counters)
    window: LogWindow = field(default_factory=LogWindow)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=lambda: {"metric": None, "step": None})
    owing: list[str] = field(default_factory=list)
    phase: Phase | None = None

    @property
    def place(self) -> tuple[int, int]:
        """Steps made, and minibatches of the update that was cut; -1 between two."""
        return self.counters.step, -1 if self.phase is None else len(self.phase.moved)


@final
@dataclass(frozen=True, eq=False)
class Trained:
    """What training has changed, whole on the rank that writes; elsewhere, of a sharded model, nothing.

    Args:
        masters: the trained weights in training precision, by name.
        moments: tensors of the optimiser, by state and name.
        options: the rest of its state.
    """

    masters: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    options: Mapping[str, Any]

    @classmethod
    def of(cls, engine: Engine) -> Trained:
        """As it is now. Every rank takes part."""
        moments, options = flatten_optimizer(engine.optimizer, engine.masters.named)
        keep = engine.accelerator.is_main_process
        masters = whole_tensors(engine.masters.named, keep=keep)
        return cls(masters, whole_tensors(moments, keep=keep), options)


def write(
    folder: Path,
    engine: Engine,
    sampler: StepSampler,
    boundary: Boundary,
    callbacks: Sequence[Mapping[str, Any]],
    random_states: Sequence[RandomState],
    parts: Mapping[str, Stateful],
    trained: Trained,
) -> None:
    """Put every file but the exported weights and the manifest into `folder`.

    Args:
        folder: an empty one.
        engine: schedule and counters.
        sampler: the data cursor.
        boundary: where the run stands.
        callbacks: what these remember.
        random_states: of every rank, in order.
        parts: what else has a state, by names without ``/``.
        trained: weights and moments.
    """
    save_tensors(folder / "train_state.safetensors", _contiguous(trained.masters))
    save_tensors(folder / "optimizer.safetensors", _contiguous(trained.moments))
    generators = {
        f"rank{rank}/{name}": tensor
        for rank, (tensors, _) in enumerate(random_states)
        for name, tensor in tensors.items()
    }
    save_tensors(folder / "rng.safetensors", generators)
    tensors, values = _state_of(parts)
    if tensors:
        save_tensors(folder / "parts.safetensors", tensors)
    state = {
        "counters": asdict(boundary.counters),
        "window": boundary.window.state(),
        "history": boundary.history,
        "best": boundary.best,
        "owing": boundary.owing,
        "cursor": sampler.state_dict(),
        "schedule": engine.schedule.state_dict(),
        "optimizer": trained.options,
        "rng": [scalars for _, scalars in random_states],
        "callbacks": callbacks,
        "skipped": engine.skipped,
        "max_tokens": engine.max_tokens,
        "parts": values,
    }
    save_state(folder / "state.json", state)
    if boundary.phase is not None:
        boundary.phase.write(folder)


def read(
    folder: Path, engine: Engine, sampler: StepSampler, parts: Mapping[str, Stateful], *, changed: bool
) -> tuple[Boundary, list[dict[str, Any]]]:
    """Continue from a verified folder: weights, moments, schedule, cursor and random states are set.

    Args:
        folder: a checkpoint.
        engine: set to its state.
        sampler: likewise.
        parts: likewise. One that the checkpoint does not know is left as it is, with a warning.
        changed: the settings are no longer those of the checkpoint, and the present ones count: the
            options of the optimiser stay, and the schedule is run to the checkpoint's step.

    Returns:
        Where the run stood, and what its callbacks remembered.
    """
    state = load_state(folder / "state.json")
    load_weights(folder, engine, {})  # the parts are set whole, below
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
    _restore(parts, folder, state.get("parts", {}))  # checkpoints of 0.1 have none
    _restore_rank(folder, state["rng"], engine.accelerator.process_index)
    boundary = Boundary(
        Counters(**state["counters"]),
        LogWindow.of(state["window"]),
        state["history"],
        state["best"],
        state["owing"],
        Phase.read(folder),
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


def _state_of(parts: Mapping[str, Stateful]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors by ``part/name``, and the other values by part."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for part, owner in parts.items():
        state = owner.state_dict()
        tensors |= {f"{part}/{name}": value for name, value in state.items() if isinstance(value, Tensor)}
        values[part] = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    return tensors, values


def _restore(parts: Mapping[str, Stateful], folder: Path, values: Mapping[str, Mapping[str, Any]]) -> None:
    file = folder / "parts.safetensors"
    tensors = load_tensors(file) if file.exists() else {}
    for part in values.keys() - parts.keys():
        logger.info("%s remembers the state of %r, which this run does not use", folder, part)
    for part, owner in parts.items():
        if part not in values:
            logger.warning("%s holds no state of %r, which goes on as it is now", folder, part)
            continue
        owner.load_state_dict({**values[part], **_tensors_of(part, tensors)})


def _tensors_of(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.partition("/")[2]: each for name, each in tensors.items() if name.startswith(f"{part}/")}


def load_weights(folder: Path, engine: Engine, parts: Mapping[str, Stateful]) -> None:
    """Set the trained weights, those of parts among them, and nothing else, to those of a checkpoint."""
    engine.masters.load(load_tensors(folder / "train_state.safetensors"))
    for part, owner in parts.items():
        if isinstance(owner, Learner):
            owner.load_weights(_tensors_of(part, load_tensors(folder / "parts.safetensors")))


def kept_weights(engine: Engine, parts: Mapping[str, Stateful]) -> Callable[[], None]:
    """Copies the trained weights, those of parts among them; what comes back sets them again."""
    own = engine.masters.copies()
    others = [(part, part.weights()) for part in parts.values() if isinstance(part, Learner)]

    def restore() -> None:
        engine.masters.load(own)
        for part, weights in others:
            part.load_weights(weights)

    return restore


def expected_bytes(engine: Engine, parts: Mapping[str, Stateful], phase: Phase | None) -> int:
    """About how much a checkpoint takes: exported weights, masters and two moments each, parts, rollouts."""
    trained = sum(weight.numel() * weight.element_size() for weight in engine.masters.named.values())
    exported = sum(weight.numel() * weight.element_size() for weight in engine.masters.weights.values())
    others = sum(tensor.numel() * tensor.element_size() for tensor in _state_of(parts)[0].values())
    rollouts = 0 if phase is None else phase.nbytes
    return exported + 3 * trained + others + rollouts + 2**20


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
