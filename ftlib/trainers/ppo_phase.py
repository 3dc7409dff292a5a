"""One update on its way: its rollouts, how far it has come, and both as files of a checkpoint.

| file | content |
|---|---|
| ``rollouts.safetensors`` | the vectors of every rollout, by ``row/name`` |
| ``rollouts.json`` | their other values, what sampling and reading told, what minibatches have done |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from ftlib.batches import Mean, Rollout, Sampling
from ftlib.engine.engine import StepResult
from ftlib.engine.files import load_state, load_tensors, save_state, save_tensors
from ftlib.losses import RunningMoments

__all__ = ["Moved", "Phase", "scaled"]

VECTORS, VALUES = "rollouts.safetensors", "rollouts.json"


def scaled(rollouts: Sequence[Rollout], moments: RunningMoments) -> list[Rollout]:
    """Scores over their running standard deviation; their mean stays."""
    return [
        rollout
        if rollout.score is None
        else replace(rollout, score=float(moments.scale(torch.tensor(rollout.score))))
        for rollout in rollouts
    ]


@final
@dataclass(frozen=True, eq=False)
class Moved:
    """What one minibatch did.

    Args:
        policy: its step, in which a critic on its trunk learns too; None where it stood still.
        critic: the step of a critic with a model of its own; None without one.
    """

    policy: StepResult | None
    critic: StepResult | None

    @property
    def results(self) -> list[StepResult]:
        """The steps that were made."""
        return [result for result in (self.policy, self.critic) if result is not None]


@final
@dataclass(eq=False)
class Phase:
    """The rollouts of an update, and how far it has come.

    Args:
        rollouts: with all numbers that stay fixed during the update.
        told: what sampling and reading have to tell: name -> `Mean` in float32 on the CPU.
        moved: what its minibatches have done so far, in order.
        seconds: spent on it so far.
    """

    rollouts: list[Rollout]
    told: Mapping[str, Mean]
    moved: list[Moved] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def nbytes(self) -> int:
        """Of its vectors."""
        return sum(vector.nbytes for rollout in self.rollouts for vector in _vectors(rollout).values())

    def write(self, folder: Path) -> None:
        """Put both files into a folder."""
        vectors = {
            f"{row}/{name}": vector
            for row, rollout in enumerate(self.rollouts)
            for name, vector in _vectors(rollout).items()
        }
        save_tensors(folder / VECTORS, vectors)
        state = {
            "rollouts": [_values(rollout) for rollout in self.rollouts],
            "told": _halves(self.told),
            "moved": [
                {"policy": _of_result(moved.policy), "critic": _of_result(moved.critic)}
                for moved in self.moved
            ],
            "seconds": self.seconds,
        }
        save_state(folder / VALUES, state)

    @classmethod
    def read(cls, folder: Path) -> Phase | None:
        """The update that a checkpoint was made in; None where it was made between two."""
        if not (folder / VALUES).exists():
            return None
        state = load_state(folder / VALUES)
        vectors: list[dict[str, Tensor]] = [{} for _ in state["rollouts"]]
        for key, vector in load_tensors(folder / VECTORS).items():
            row, _, name = key.partition("/")
            vectors[int(row)][name] = vector
        return cls(
            [
                Rollout(**{**values, **own, "sampling": _sampling(values["sampling"])})
                for values, own in zip(state["rollouts"], vectors, strict=True)
            ],
            _means(state["told"]),
            [Moved(_result(moved["policy"]), _result(moved["critic"])) for moved in state["moved"]],
            state["seconds"],
        )


def _vectors(rollout: Rollout) -> dict[str, Tensor]:
    return {name: value for name, value in vars(rollout).items() if isinstance(value, Tensor)}


def _values(rollout: Rollout) -> dict[str, Any]:
    plain = {name: value for name, value in vars(rollout).items() if not isinstance(value, Tensor)}
    return {**plain, "sampling": asdict(rollout.sampling)}


def _sampling(values: Mapping[str, Any]) -> Sampling:
    """JSON knows no tuples."""
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return Sampling(**plain)


def _halves(means: Mapping[str, Mean]) -> dict[str, list[float]]:
    return {name: [float(mean.sum), float(mean.count)] for name, mean in means.items()}


def _means(halves: Mapping[str, Sequence[float]]) -> dict[str, Mean]:
    return {name: Mean(torch.tensor(total), torch.tensor(count)) for name, (total, count) in halves.items()}


def _of_result(result: StepResult | None) -> dict[str, Any] | None:
    if result is None:
        return None
    return {**vars(result), "terms": _halves(result.terms), "metrics": _halves(result.metrics)}


def _result(state: Mapping[str, Any] | None) -> StepResult | None:
    if state is None:
        return None
    return StepResult(**{**state, "terms": _means(state["terms"]), "metrics": _means(state["metrics"])})
