"""Row errors gathered and raised at once, so that a file is repaired in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftlib.errors import DataError

__all__ = ["REJECTED", "SHOWN", "InputNotFoundError", "describe", "gathered", "rejected_entry"]

REJECTED = ("file", "row", "column", "code", "reason", "content")  # keys of a row in a file of rejects

SHOWN = 20  # row errors printed in full; the rest are counted
EXCERPT = 80  # characters of a value quoted in a message


class InputNotFoundError(DataError, FileNotFoundError):
    """The path does not exist or is a directory."""


def describe(value: object) -> str:
    """What was found, short enough for a message: `null`, or the start of its repr.

    Example:
        >>> describe(None), describe("")
        ('null', "''")
    """
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= EXCERPT else text[: EXCERPT - 1] + "…"


def gathered(problems: Sequence[DataError]) -> DataError:
    """One error for all of `problems`, in their order: the first 20 in full, the rest counted.

    Its file, row and column are those of the first; its code is theirs where all agree, otherwise
    ``"bad_row"``.
    """
    first, *rest = problems
    if not rest:
        return first
    lines = [first.message, *(str(problem) for problem in rest[: SHOWN - 1])]
    hidden = len(problems) - len(lines)
    if hidden:
        lines.append(f"... and {hidden} more of {len(problems)} bad rows.")
    codes = {problem.code for problem in problems}
    return DataError(
        "\n".join(lines), **{**first.fields, "code": first.code if len(codes) == 1 else "bad_row"}
    )


def rejected_entry(error: DataError, content: Any) -> dict[str, Any]:
    """A bad row for a file of rejects: where it stands, what is wrong with it, and the row itself."""
    values = (error.file, error.row, error.column, error.code, error.message, content)
    sheet = {} if error.sheet is None else {"sheet": error.sheet}
    return {**dict(zip(REJECTED, values, strict=True)), **sheet}
