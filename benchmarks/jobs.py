"""What the driver asks of a child process: three kinds of jobs, each a record in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.records import Machine, Run, Workload

__all__ = ["JOBS", "Evaluate", "Evaluation", "Prepare", "Prepared", "Task", "Train", "adapter_folder"]


@dataclass(frozen=True)
class Prepare:
    """Write rows and adapters that both sides load, and measure the machine.

    Args:
        data: a file, or "" for the task's own.
        folder: where rows and adapters go.
        steps: of one epoch.
        matmul_size, copy_bytes: of the measurements of the machine.
    """

    task: str
    model: str
    data: str
    folder: str
    steps: int
    epochs: int
    batch_size: int
    learning_rate: float
    held_out: int
    pairs: int
    seed: int
    matmul_size: int
    copy_bytes: int


@dataclass(frozen=True)
class Prepared:
    """What `Prepare` leaves besides the files."""

    machine: Machine
    workload: Workload


@dataclass(frozen=True)
class Train:
    """One training run of one side.

    Args:
        precision: "default", or "float32" for weights and computation in float32.
        folder: that of `Prepare`.
        adapter: the initialisation to load.
        output: a folder for the trained adapter.
        steps: that the schedule is made for, in all epochs together.
        stop_after: steps that are taken.
        seed: of what a side draws.
    """

    task: str
    side: str
    model: str
    device: str
    precision: str
    folder: str
    adapter: str
    output: str
    steps: int
    stop_after: int
    batch_size: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Evaluate:
    """Score saved adapters on the held-out rows with neither side's code.

    Args:
        adapters: folders of trained adapters by name.
        initial: name -> the initialisation it started from.
    """

    task: str
    model: str
    folder: str
    adapters: dict[str, str]
    initial: dict[str, str]


@dataclass(frozen=True)
class Evaluation:
    """By name: loss on the held-out rows, distance from the initialisation, and accuracy on pairs."""

    losses: dict[str, float]
    deltas: dict[str, float]
    accuracies: dict[str, float] = field(default_factory=dict)


JOBS: Mapping[str, type[Any]] = {"prepare": Prepare, "train": Train, "evaluate": Evaluate}


@dataclass(frozen=True)
class Task:
    """What one task brings: its rows, its sides by name, its neutral evaluator."""

    prepare: Callable[[Prepare], Workload]
    sides: Mapping[str, Callable[[Train], Run]]
    evaluate: Callable[[Evaluate], Evaluation]


def adapter_folder(folder: Path, pair: int) -> Path:
    """Where `Prepare` puts the initialisation of a pair."""
    return folder / f"adapter-{pair}"
