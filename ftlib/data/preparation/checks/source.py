"""Checks of the source: its format, its size, its columns."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ftlib.data.preparation.check import Check, Context, Finding, Fix
from ftlib.data.preparation.columns import COLUMNS
from ftlib.data.preparation.words import counted

__all__ = ["COLUMN_NAMES", "EXTRA_COLUMNS", "FORMAT", "ROW_COUNT"]

_FEW = 100
_UTF8 = ("utf-8", "ascii")


def _format(context: Context) -> Iterator[Finding]:
    parts = context.intake.parts
    if all(
        part.path is not None
        and part.path.suffix.lower() == ".jsonl"
        and part.facts.format == "jsonl"
        and part.facts.compression is None
        and (part.facts.encoding is None or codecs.lookup(part.facts.encoding).name in _UTF8)
        for part in parts
    ):
        return
    facts, notes = context.intake.facts, context.intake.notes
    found = {
        "format": facts.format,
        "shape": facts.shape,
        "compression": facts.compression,
        "encoding": facts.encoding,
        "delimiter": facts.delimiter,
        "sheet": facts.sheet,
    }
    data: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
    if notes["stray_quotes"]:
        data["stray_quotes"] = True
    twice = [name for name, times in Counter(facts.header or ()).items() if times > 1 and name.strip()]
    if twice:
        data["merged"] = twice
    if len(parts) > 1:
        data["files"] = {part.facts.file: part.facts.format for part in parts}
    quotes = "; stray quotes are kept as they are" if notes["stray_quotes"] else ""
    merged = f"; columns of one name and content count once: {', '.join(map(repr, twice))}" if twice else ""
    yield Finding(
        f"read as {facts.format} ({facts.shape}){quotes}{merged}",
        data=data,
        fix=Fix("necessary", "Convert to JSONL"),
    )


def _row_count(context: Context) -> Iterator[Finding]:
    rows = len(context.table)
    if rows < _FEW:
        yield Finding(
            f"{counted(rows, 'row')}; a few hundred are advised, and each doubling helps about linearly",
            count=rows,
            data={"rows": rows, "advised": "a few hundred"},
        )


def _column_name(column: str) -> Check:
    def find(context: Context) -> Iterator[Finding]:
        mapped = context.settings.columns.get(column, column)
        if mapped != column:
            yield _taken(column, mapped, None)
        rename, is_there = context.intake.renames.get(column), column in context.intake.columns
        if rename is not None and is_there:
            yield Finding(
                f"column {rename.found!r} loses to {column!r}",
                data={"column": column, "found": rename.found, "loser": rename.found},
                doubt=True,
            )
        elif rename is not None:
            yield _taken(column, rename.found, rename.loser)
        elif not is_there:  # only prompts, of data that were said to be open-ended
            yield Finding(
                f"no column {column!r}: it is empty",
                data={"column": column},
                fix=Fix("necessary", f"Add an empty {column!r}", {"add": column}),
            )

    return Check(
        "column_name",
        f"the {column} column differs from `{column}` by case or outer blanks, was mapped, or is absent",
        find,
        "rename or add; the exact name wins, the loser is reported",
        "necessary",
    )


def _taken(column: str, found: str, loser: str | None) -> Finding:
    """The column is spelled otherwise in the source."""
    data = {"column": column, "found": found} | ({} if loser is None else {"loser": loser})
    return Finding(
        f"column {found!r} is taken for {column!r}",
        data=data,
        doubt=loser is not None,
        fix=Fix("necessary", f"Rename {found!r} to {column!r}", {"from": found, "to": column}),
    )


def _extra_columns(context: Context) -> Iterator[Finding]:
    intake = context.intake
    if not intake.extra:
        return
    data: dict[str, object] = {"columns": intake.extra}
    if intake.unnamed:
        data["unnamed"] = intake.unnamed
    yield Finding(
        f"further columns: {', '.join(map(repr, intake.extra))}",
        count=len(intake.extra),
        data=data,
        fix=Fix("necessary", "Leave out further columns", {"columns": intake.extra}),
    )


FORMAT = Check("format", "the input is not JSONL", _format, "convert", "necessary", pairs_only=False)
ROW_COUNT = Check("row_count", "fewer than 100 rows", _row_count, pairs_only=False)
COLUMN_NAMES = tuple(map(_column_name, COLUMNS))
EXTRA_COLUMNS = Check(
    "extra_columns", "more columns than prompt and completion", _extra_columns, "leave out, list", "necessary"
)
