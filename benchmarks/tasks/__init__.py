"""One file per task. A new one takes a row in `TASKS` and defines `TASK`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module

from benchmarks.jobs import Task

__all__ = ["ALONE", "BASELINES", "TASKS", "Offer", "task_named"]

ALONE = "none"  # no baseline
BASELINES = ("trl", ALONE)


@dataclass(frozen=True)
class Offer:
    """What is known of a task without importing it.

    Args:
        learning_rate: of both sides.
        sides: baseline -> its sides: the one that is compared by default, then its best settings.
        ours: the sides of ftlib; each is compared with every side of the baseline.
        environments: baseline -> the environment that its sides need, where it is not the project's.
    """

    learning_rate: float
    sides: Mapping[str, tuple[str, tuple[str, ...]]]
    ours: tuple[str, ...] = ("ftlib",)
    environments: Mapping[str, str] = field(default_factory=dict)

    def default(self, baseline: str) -> tuple[str, ...]:
        """The one side of a baseline that is compared by default; none without a baseline."""
        return () if baseline == ALONE else (self.sides[baseline][0],)

    def best(self, baseline: str) -> tuple[str, ...]:
        """The sides with a baseline's best settings."""
        return () if baseline == ALONE else self.sides[baseline][1]


TASKS = {
    "sft": Offer(2e-4, {"trl": ("trl", ("trl-tuned", "trl-flat"))}),
    "reward": Offer(1e-4, {"trl": ("trl", ("trl-tuned",))}),
    "dpo": Offer(5e-5, {"trl": ("trl", ("trl-tuned",))}),
    "ppo": Offer(
        1e-5,
        {"trl": ("trl", ("trl-autocast", "trl-tuned", "trl-adapter"))},
        ours=("ftlib", "ftlib-adapter"),
        environments={"trl": "trl-1.12"},
    ),
}


def task_named(name: str) -> Task:
    """The task's own module is imported here, in the child process, with all it needs."""
    task: Task = import_module(f"benchmarks.tasks.{name}").TASK
    return task
