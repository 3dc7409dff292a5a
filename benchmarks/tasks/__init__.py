"""One file per task. A new one takes a row in `TASKS` and defines `TASK`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

from benchmarks.jobs import Task

__all__ = ["BASELINES", "TASKS", "Offer", "task_named"]

BASELINES = ("trl",)


@dataclass(frozen=True)
class Offer:
    """What is known of a task without importing it.

    Args:
        learning_rate: of both sides.
        sides: baseline -> its sides: the one that is compared by default, then its best settings.
    """

    learning_rate: float
    sides: Mapping[str, tuple[str, tuple[str, ...]]]


TASKS = {
    "sft": Offer(2e-4, {"trl": ("trl", ("trl-tuned", "trl-flat"))}),
    "reward": Offer(1e-4, {"trl": ("trl", ("trl-tuned",))}),
    "dpo": Offer(5e-5, {"trl": ("trl", ("trl-tuned",))}),
}


def task_named(name: str) -> Task:
    """The task's own module is imported here, in the child process, with all it needs."""
    task: Task = import_module(f"benchmarks.tasks.{name}").TASK
    return task
