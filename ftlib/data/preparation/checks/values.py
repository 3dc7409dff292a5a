"""Checks of single values: what was no text, no legal text, or nothing at all."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from ftlib.data.preparation.affixes import without
from ftlib.data.preparation.check import Check, Context, Finding, Fix
from ftlib.data.preparation.intake import rows_with
from ftlib.data.preparation.table import Column, Edit, Row
from ftlib.data.preparation.words import counted

__all__ = ["CONTROL_CHAR", "EMPTY_COMPLETION", "EMPTY_PROMPT", "LONE_SURROGATE", "NONSTRING_VALUE"]

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]+")


def _nonstring(context: Context) -> Iterator[Finding]:
    rows = context.intake.converted
    if rows:
        yield Finding(f"values that are no text, which become JSON text: {counted(len(rows), 'row')}", rows)


def _surrogates(context: Context) -> Iterator[Finding]:
    rows = context.intake.surrogates
    if rows:
        yield Finding(f"lone surrogates, which become U+FFFD: {counted(len(rows), 'row')}", rows)


def _empty(context: Context) -> Iterator[Finding]:
    reasons = context.intake.empty
    if not reasons:
        return
    rows = rows_with(reasons)
    counts = {reason: len(of) for reason, of in reasons.items()}
    yield Finding(
        counted(len(rows), "empty completion"),
        rows,
        data={"reasons": counts},
        fix=Fix("necessary", "Drop rows with empty completions", {"rows": len(rows)}, drop=rows),
    )


def _empty_prompt(context: Context) -> Iterator[Finding]:
    rows = context.scan.empty_prompt
    if not rows:
        return
    if context.task == "open-ended":
        return
    yield Finding(f"{counted(len(rows), 'empty prompt')} of {len(context.table):,}", rows)


def _control(context: Context) -> Iterator[Finding]:
    rows = context.scan.control
    if not rows:
        return
    fix = None
    if context.is_pairs:
        columns: tuple[Column, ...] = ("prompt", "completion")
        edits = tuple(Edit("control_char", column, _stripped) for column in columns)
        blank = [row.number for row in context.table.rows(rows) if not _said(row, context.ending)]
        fix = Fix(
            "off",
            "Remove control characters"
            + (f", and {counted(len(blank), 'row')} of nothing else" if blank else ""),
            {"rows": len(blank)} if blank else {},
            drop=np.array(blank, dtype=np.int64) if blank else None,
            edits=edits,
        )
    yield Finding(
        f"control characters: {counted(len(rows), 'row')}",
        rows,
        fix=fix,
    )


def _said(row: Row, ending: str | None) -> str:
    """What the completion says without control characters and ending."""
    return without(_stripped(row.completion), ending).strip()


def _stripped(text: str) -> str:
    return _CONTROL.sub("", text)


NONSTRING_VALUE = Check(
    "nonstring_value", "a value is a number, a boolean, a list or an object", _nonstring, added=True
)
LONE_SURROGATE = Check(
    "lone_surrogate", "a value holds half of a surrogate pair", _surrogates, pairs_only=False, added=True
)
EMPTY_COMPLETION = Check(
    "empty_completion",
    "a completion is empty, blank, null, or missing",
    _empty,
    "drop",
    "necessary",
)
EMPTY_PROMPT = Check("empty_prompt", "some prompts are empty", _empty_prompt, added=True)
CONTROL_CHAR = Check(
    "control_char",
    "a value holds control characters other than tab and line ends",
    _control,
    "remove them, and rows whose completion is nothing else",
    "off",
    pairs_only=False,
    added=True,
)
