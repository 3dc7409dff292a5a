"""Checks that drop rows: exact duplicates, and rows that are too long."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ftlib.data.preparation.check import Check, Context, Finding, Fix
from ftlib.data.preparation.checks.task import is_few
from ftlib.data.preparation.table import Table
from ftlib.data.preparation.tokens import BYTES_PER_TOKEN
from ftlib.data.preparation.words import counted

__all__ = ["DUPLICATE", "LENGTH_ESTIMATE", "TOO_LONG"]

_MOST_CHARS = 10_000


def _duplicate(context: Context) -> Iterator[Finding]:
    table = context.table
    rows = _repeated(context)
    if not len(rows):
        return
    distinct = table.distinct_completions
    repetition_tells = context.task == "open-ended" and distinct >= 2 and is_few(distinct, len(table))
    share = f"{counted(len(rows), 'repeated row')} of {len(table):,}"
    yield Finding(
        share
        + ("; here repetition carries information. Were prompts forgotten?" if repetition_tells else ""),
        rows,
        data={"of": len(table), "distinct_completions": distinct},
        doubt=repetition_tells,
        fix=Fix(
            "off" if repetition_tells else "on",
            f"Drop {counted(len(rows), 'duplicate row')}",
            {"rows": len(rows)},
            drop=rows,
        ),
    )


def _repeated(context: Context) -> NDArray[np.int64]:
    """Rows whose pair stands in an earlier row too."""
    kept = context.table.kept
    first, second = (context.intake.array(name)[kept] for name in ("prompt_hashes", "completion_hashes"))
    order = np.lexsort((second, first))  # stable: equal pairs stay in the order of the rows
    again = (np.diff(first[order]) == 0) & (np.diff(second[order]) == 0)
    return np.sort(context.table.indices[order[1:][again]])


def _too_long(context: Context) -> Iterator[Finding]:
    table, limit = context.table, context.settings.max_length
    counter = context.settings.counter
    if counter is None:
        rows = table.indices[context.intake.array("chars")[table.kept] > _MOST_CHARS]
        data = {"limit": _MOST_CHARS, "unit": "characters"}
    else:
        finished = context.finished(context) if context.finished is not None else table
        lengths = np.fromiter(
            counter.lengths(_texts(finished, is_pairs=context.is_pairs)), np.int64, len(table)
        )
        rows = table.indices[lengths > limit]
        data = {"limit": limit, "unit": "tokens"}
    if not len(rows):
        return
    yield Finding(
        f"{counted(len(rows), 'row')} of more than {data['limit']:,} {data['unit']}",
        rows,
        data=data,
        fix=Fix(
            "off" if context.task == "open-ended" else "on",
            f"Drop {counted(len(rows), 'long row')}",
            {"rows": len(rows), **data},
            drop=rows,
        ),
    )


def _texts(table: Table, *, is_pairs: bool) -> Iterator[str]:
    for row in table.rows():
        yield row.prompt + row.completion if is_pairs else row.prompt


def _length_estimate(context: Context) -> Iterator[Finding]:
    if context.settings.counter is not None:
        return
    table, limit = context.table, context.settings.max_length
    rows = table.indices[context.intake.array("bytes")[table.kept] > BYTES_PER_TOKEN * limit]
    if len(rows):
        yield Finding(
            f"{counted(len(rows), 'row')} of perhaps over {limit:,} tokens, {BYTES_PER_TOKEN} bytes each",
            rows,
            data={"limit": limit, "unit": "tokens", "bytes_per_token": BYTES_PER_TOKEN},
        )


DUPLICATE = Check(
    "duplicate",
    "an earlier row holds the same pair",
    _duplicate,
    "keep the first; off for open-ended data with few different completions",
    "on",
    pairs_only=False,
)
TOO_LONG = Check(
    "too_long",
    "tokens of the finished text > max_length; without a tokenizer, more than 10,000 characters",
    _too_long,
    "drop; off for open-ended data",
    "on",
    pairs_only=False,
)
LENGTH_ESTIMATE = Check(
    "length_estimate",
    "without a tokenizer: UTF-8 bytes / 3 > max_length",
    _length_estimate,
    pairs_only=False,
    added=True,
)
