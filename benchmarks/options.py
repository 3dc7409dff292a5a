"""What a benchmark is to do: the command line, checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """Settings of one benchmark.

    Args:
        model: a folder.
        data: a file, or "" for the task's own.
        steps: optimiser steps of one epoch.
        tuned: sides with the baseline's best settings to run as well.
        allocator: environment of extra runs of both sides; empty for none.
        force: start on a busy machine.
        baseline_python: interpreter of the baseline's sides.
    """

    task: str
    baseline: str
    pairs: int
    model: str
    data: str
    steps: int
    epochs: int
    learning_rate: float
    out: Path
    device: str
    tuned: tuple[str, ...]
    allocator: dict[str, str]
    force: bool
    baseline_python: str
    batch_size: int = 8
    held_out: int = 64
    seed: int = 0
    dropped: int = 2
    matmul_size: int = 2048
    copy_bytes: int = 2**28
