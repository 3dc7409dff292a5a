"""All checks, in the order in which they run, each on the table left by the fixes accepted before it."""

from __future__ import annotations

from ftlib.data.preparation.check import Check
from ftlib.data.preparation.checks.affix import (
    COMPLETION_ENDING,
    COMPLETION_PREFIX,
    LEADING_SPACE,
    PROMPT_PREFIX,
    PROMPT_SEPARATOR,
)
from ftlib.data.preparation.checks.case import COMPLETION_CASE, PROMPT_CASE
from ftlib.data.preparation.checks.content import (
    ANSWER_IN_PROMPT,
    PII,
    SECRET,
    SEPARATOR_IN_COMPLETION,
    TRAILING_BLANK,
)
from ftlib.data.preparation.checks.dropping import DUPLICATE, LENGTH_ESTIMATE, TOO_LONG
from ftlib.data.preparation.checks.labels import CLASS_IMBALANCE, LABEL_TOKENS, LABEL_VARIANT, RARE_CLASS
from ftlib.data.preparation.checks.repeats import CONFLICTING_COMPLETION, NEAR_DUPLICATE
from ftlib.data.preparation.checks.source import COLUMN_NAMES, EXTRA_COLUMNS, FORMAT, ROW_COUNT
from ftlib.data.preparation.checks.splitting import LEAKAGE, SPLIT
from ftlib.data.preparation.checks.task import NOTHING_TO_LEARN, TASK, TASK_AGAIN
from ftlib.data.preparation.checks.values import (
    CONTROL_CHAR,
    EMPTY_COMPLETION,
    EMPTY_PROMPT,
    LONE_SURROGATE,
    NONSTRING_VALUE,
)

__all__ = ["CHECKS", "EDITS"]

# What gives the text its final shape.
EDITS: tuple[Check, ...] = (
    PROMPT_CASE,
    COMPLETION_CASE,
    PROMPT_SEPARATOR,
    PROMPT_PREFIX,
    COMPLETION_PREFIX,
    COMPLETION_ENDING,
    LEADING_SPACE,
)
CHECKS: tuple[Check, ...] = (
    FORMAT,
    ROW_COUNT,
    *COLUMN_NAMES,
    EXTRA_COLUMNS,
    NONSTRING_VALUE,
    LONE_SURROGATE,
    EMPTY_COMPLETION,
    TASK,
    DUPLICATE,
    LENGTH_ESTIMATE,
    TOO_LONG,
    NOTHING_TO_LEARN,
    *EDITS,
    CONTROL_CHAR,
    PII,
    SECRET,
    EMPTY_PROMPT,
    TRAILING_BLANK,
    SEPARATOR_IN_COMPLETION,
    ANSWER_IN_PROMPT,
    CONFLICTING_COMPLETION,
    NEAR_DUPLICATE,
    TASK_AGAIN,
    NOTHING_TO_LEARN,
    LABEL_VARIANT,
    RARE_CLASS,
    CLASS_IMBALANCE,
    LABEL_TOKENS,
    SPLIT,
    LEAKAGE,
)
