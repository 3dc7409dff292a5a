"""Checks of the source: its format, its size, its columns."""

from __future__ import annotations

import codecs
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
    if len(parts) > 1:
        data["files"] = {part.facts.file: part.facts.format for part in parts}
    quotes = "; stray quotes are kept as they are" if notes["stray_quotes"] else ""
    yield Finding(
        f"read as {facts.format} ({facts.shape}){quotes}",
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
        rename = context.intake.renames.get(column)
        if rename is None:
            return
        has_exact = column in context.intake.columns
        loser = rename.found if has_exact else rename.loser
        data = {"column": column, "found": rename.found}
        if loser is not None:
            data["loser"] = loser
        if has_exact:
            yield Finding(f"column {rename.found!r} loses to {column!r}", data=data, doubt=True)
            return
        yield Finding(
            f"column {rename.found!r} is taken for {column!r}",
            data=data,
            doubt=loser is not None,
            fix=Fix(
                "necessary", f"Rename {rename.found!r} to {column!r}", {"from": rename.found, "to": column}
            ),
        )

    return Check(
        "column_name",
        f"the {column} column differs from `{column}` by case or outer blanks",
        find,
        "rename; the exact name wins, the loser is reported",
        "necessary",
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
