"""What the data are for, and the errors of data that can teach nothing."""

from __future__ import annotations

from collections.abc import Iterator

from ftlib.data.preparation.check import Check, Context, Finding
from ftlib.data.preparation.words import counted
from ftlib.errors import DataError

__all__ = ["NOTHING_TO_LEARN", "TASK", "TASK_AGAIN", "guess", "is_few"]


def guess(context: Context) -> str:
    """The task, as the user says, or else by what the rows look like now."""
    if not context.is_pairs:
        return context.intake.form
    if context.settings.task is not None:
        return context.settings.task
    table = context.table
    if table.survey("prompt").empty == len(table):
        return "open-ended"
    return "classification" if is_few(table.distinct_completions, len(table)) else "conditional"


def is_few(distinct: int, rows: int) -> bool:
    """Fewer different completions than a third of the rows."""
    return 3 * distinct < rows


def _task(context: Context) -> Iterator[Finding]:
    task = guess(context)
    distinct = context.table.distinct_completions
    yield Finding(
        f"taken for {task} data ({counted(distinct, 'different completion')} in "
        f"{counted(len(context.table), 'row')})",
        count=len(context.table),
        data={"task": task, "distinct_completions": distinct},
        known={"task": task},
    )


def _task_again(context: Context) -> Iterator[Finding]:
    task = guess(context)
    if task != context.task:
        yield Finding(
            f"after the fixes taken for {task} data",
            count=len(context.table),
            data={"task": task, "before": context.task},
            doubt=True,
            known={"task": task},
        )


def _nothing_to_learn(context: Context) -> Iterator[Finding]:
    """No findings: data of two rows or more that are all alike are refused."""
    table, file = context.table, context.intake.facts.file
    if len(table) < 2:
        return
    if context.task != "open-ended" and table.survey("prompt").same:
        raise DataError(
            f"expected different prompts, got the same one in all {len(table)} rows. For open-ended data "
            "leave the prompts empty; otherwise let each prompt say what is asked.",
            code="identical_prompts",
            file=file,
            column="prompt",
        )
    if not table.survey("completion").same:
        return
    if context.task == "classification":
        raise DataError(
            f"expected several classes, got a single one in all {len(table)} rows: it teaches nothing. "
            "Add rows of another class.",
            code="single_class",
            file=file,
            column="completion",
        )
    if context.task == "conditional":
        raise DataError(
            f"expected different completions, got the same one in all {len(table)} rows. Add rows with "
            "other completions.",
            code="identical_completions",
            file=file,
            column="completion",
        )
    yield from ()


TASK = Check("task", "always: open-ended, classification or conditional", _task, pairs_only=False)
TASK_AGAIN = Check("task", "the fixes have changed the task", _task_again)
NOTHING_TO_LEARN = Check("nothing_to_learn", "all prompts, or all completions, are one", _nothing_to_learn)
