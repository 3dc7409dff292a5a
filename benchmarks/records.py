"""The shape of a result file: written with `write`, read back strictly with `read`.

Seconds, bytes, nats and tokens throughout. Hashes are SHA-256 in hexadecimal.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "Comparison",
    "Drawing",
    "Machine",
    "Result",
    "Run",
    "Side",
    "Step",
    "Summary",
    "Workload",
    "read",
    "write",
]

VERSION = 3


@dataclass(frozen=True)
class Step:
    """One optimiser step.

    Args:
        seconds: from the end of the step before (for the first: from its own begin) to the end of this one.
        inside_seconds: from `on_step_begin` to `on_step_end`.
        loss: mean over the trained tokens or the pairs, before the update.
        grad_norm: before clipping.
        tokens: real tokens, padding not counted; of a pair those of both sequences, the prompt twice.
        trained_tokens: tokens with a label: those whose prediction, or where a score, enters the loss.
        rows_sha256: of the ids and labels of the step's examples, in any order; where completions are drawn,
            of the prompts.
        measures: further numbers of the task, by name.
    """

    seconds: float
    inside_seconds: float
    loss: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    rows_sha256: str
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training run in a process of its own.

    Args:
        label: what the tables call it: the side, and its environment where that is not the common one.
        pair: runs of one pair share data, order and initialisation, and follow each other directly.
        precision: "default", or "float32" in the parity runs.
        peak_bytes: most resident memory of the process up to the end of training.
        user_seconds, system_seconds, minor_faults, major_faults, involuntary_switches: of the training loop.
        others_cpu: busiest other process before the run, in cores.
        wall_seconds: of all steps together.
        ahead_seconds: spent between building the trainer and its first step, on set-up and perhaps on a
            reference's log-probabilities; loading and tokenising are not counted.
        epochs: passes over the data, all of the same number of steps.
        weights_dtype: of the base model's matrices.
        base_sha256: of the base weights, before and after training.
        adapter_delta: Euclidean distance of the saved adapter from its initialisation.
        eval_loss: of the saved adapter on held-out rows, by the neutral evaluator; None until it has run.
        eval_accuracy: share of held-out pairs whose chosen answer is preferred; None without pairs.
        disturbed: another run replaces this one, because its side's runs were too far apart.
        versions: of interpreter and libraries.
    """

    label: str
    side: str
    pair: int
    precision: str
    environment: dict[str, str]
    threads: int
    weights_dtype: str
    steps: list[Step]
    peak_bytes: int
    user_seconds: float
    system_seconds: float
    minor_faults: int
    major_faults: int
    involuntary_switches: int
    wall_seconds: float
    ahead_seconds: float
    base_sha256: list[str]
    epochs: int = 1
    others_cpu: float = 0.0
    adapter_delta: float = 0.0
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    disturbed: bool = False
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """Where it ran, and what that place can do.

    Args:
        matmul_flops: dense square matrix product, FLOP/s, by dtype.
        copy_bytes: bytes read plus bytes written per second by a large copy.
    """

    cpu: str
    flags: list[str]
    cores: int
    memory_bytes: int
    system: str
    allocator: str
    load_average: list[float]
    versions: dict[str, str]
    matmul_flops: dict[str, float]
    copy_bytes: float


@dataclass(frozen=True)
class Drawing:
    """What each side draws by itself in every step: one completion of each prompt. Losses then differ.

    Args:
        new_tokens: of every completion.
        updates: optimiser steps on them.
        temperature: of sampling.
        floor_flops, floor_bytes: of drawing, for each step of every epoch, the least work.
    """

    new_tokens: int
    updates: int
    temperature: float
    floor_flops: list[float]
    floor_bytes: list[float]


@dataclass(frozen=True)
class Workload:
    """What both sides train on.

    Args:
        data, model: where they came from.
        unit: what one example is called, in the plural.
        rows: training examples, in order; `held_out` ones are for evaluation.
        left_out: examples that were longer than `max_length` tokens.
        differing: examples left out because the baseline takes text alone and tokenises it differently.
        epochs: passes over the training examples.
        starts_at: the loss of the first step, where it is known beforehand; else None.
        seeds: of the order of the rows, and of the adapter of each pair.
        sizes: weights of the body's matrices, of the head and of the adapter; layers; two widths.
        floor_flops, floor_bytes: of each step of every epoch, the least work that the task needs, drawing
            left out.
        drawing: None where both sides train on the same completions.
    """

    data: str
    data_sha256: str
    model: str
    model_sha256: str
    unit: str
    rows: int
    held_out: int
    left_out: int
    differing: int
    max_length: int
    batch_size: int
    epochs: int
    starts_at: float | None
    learning_rate: float
    adapter: dict[str, Any]
    seeds: dict[str, int]
    sizes: dict[str, int]
    floor_flops: list[float]
    floor_bytes: list[float]
    drawing: Drawing | None = None


@dataclass(frozen=True)
class Side:
    """The runs under one label, summed up.

    Args:
        step_seconds: median over its runs of the median step; `step_range` the least and greatest of these.
            Of several epochs, the mean of the epochs' medians.
        epoch_seconds: the median step of each epoch.
        ahead_seconds: median over runs.
        tokens_per_second: real tokens, median over runs.
        peak_bytes: median over runs.
        efficiency: floor time over measured time, median step.
        rounding: largest difference of a step's loss from the float32 run's, over the steps of both; None
            where losses are not comparable.
        scores: mean score of each run's completions; empty where none are drawn.
        measures: of a step's further numbers, the median over runs of the median step.
    """

    runs: int
    step_seconds: float
    step_range: list[float]
    epoch_seconds: list[float]
    ahead_seconds: float
    spread: float
    tokens_per_second: float
    peak_bytes: int
    efficiency: float
    rounding: float | None
    eval_losses: list[float]
    eval_accuracies: list[float]
    faults_per_step: float
    cpu_seconds_per_step: float
    involuntary_switches: int
    scores: list[float]
    measures: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """ftlib against one other label: ratios within pairs, their median and range.

    Args:
        speed: how many times faster, by the median step.
        epoch_speeds: likewise in each epoch.
        speed_in_all: likewise, with what each did ahead spread over its steps.
        memory: peak of ftlib as a share of the other's.
        loss_difference: largest difference in the loss of a step; None where losses are not comparable.
        eval_difference: largest difference in the evaluation loss.
    """

    label: str
    baseline: str
    speed: float
    speed_range: list[float]
    epoch_speeds: list[float]
    speed_in_all: float
    memory: float
    loss_difference: float | None
    eval_difference: float


@dataclass(frozen=True)
class Summary:
    """What the runs say.

    Args:
        parity: largest relative difference in the loss of a step of the float32 runs; None without them.
        seed_range: least and greatest evaluation loss of the baseline over the pairs' seeds.
        problems: checks that failed; nothing here depends on speed.
        notes: what a reader should know, such as runs that were repeated.
    """

    sides: dict[str, Side]
    comparisons: list[Comparison]
    parity: float | None
    seed_range: list[float]
    problems: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Result:
    """A whole benchmark; `complete` is False in what an interrupted one leaves."""

    task: str
    baseline: str
    date: str
    commit: str
    complete: bool
    command: list[str]
    dropped_steps: int
    environment: dict[str, str]
    machine: Machine
    workload: Workload
    runs: list[Run] = field(default_factory=list)
    parity_runs: list[Run] = field(default_factory=list)
    summary: Summary | None = None
    version: int = VERSION


def write(path: Path, record: Any) -> None:
    """A record as JSON; the file is whole at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    text = json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False)
    fresh.write_text(text + "\n", encoding="utf-8")
    fresh.replace(path)


def read(path: Path, kind: type[Any] = Result) -> Any:
    """A record from JSON.

    Raises:
        ValueError: names or types that the record does not have, or lacks, with their place in the file.
    """
    return _parse(json.loads(path.read_text(encoding="utf-8")), kind, path.name)


def _parse(value: Any, kind: Any, where: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _parse_record(value, typing.cast("type[Any]", kind), where)
    if origin is list and isinstance(value, list):
        return [_parse(item, inner[0], f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _parse(item, inner[1], f"{where}.{key}") for key, item in value.items()}
    if origin is types.UnionType:
        return None if value is None else _parse(value, inner[0], where)
    if kind is float and type(value) in (int, float):
        return float(value)
    if origin is None and type(value) is kind:
        return value
    raise ValueError(f"{where}: expected {kind}, got {value!r:.80}.")


def _parse_record(value: Any, kind: type[Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    if not isinstance(value, dict) or set(value) != set(hints):
        found = sorted(value) if isinstance(value, dict) else value
        raise ValueError(f"{where}: expected the fields {sorted(hints)}, got {found!r:.200}.")
    return kind(**{name: _parse(value[name], hint, f"{where}.{name}") for name, hint in hints.items()})
