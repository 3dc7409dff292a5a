"""One file per task. A new one takes a row in `TASKS` and defines `TASK` and `BASELINES`."""

from __future__ import annotations

from importlib import import_module

from benchmarks.jobs import Task

__all__ = ["BASELINES", "TASKS", "task_named"]

TASKS = ("sft",)
# baseline -> its sides: the one that is compared by default, then its best settings
BASELINES = {"trl": ("trl", ("trl-tuned", "trl-flat"))}


def task_named(name: str) -> Task:
    """The task's own module is imported here, in the child process, with all it needs."""
    task: Task = import_module(f"benchmarks.tasks.{name}").TASK
    return task
