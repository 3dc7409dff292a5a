"""Cells to text: what is written for a number, a list, a missing value."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

__all__ = ["Cell", "cell_text", "legible"]

_SURROGATE = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"


def legible(text: str) -> str:
    """`text` with U+FFFD for lone surrogates, which UTF-8 does not have."""
    return _SURROGATE.sub(_REPLACEMENT, text)


class Cell(NamedTuple):
    """The text of a value; why it is empty, if it is; whether it was no text; whether it was repaired."""

    text: str
    empty: str | None = None
    converted: bool = False
    surrogates: bool = False


def cell_text(value: Any, *, present: bool = True, in_workbook: bool = False, in_table: bool = False) -> Cell:
    r"""What a value is as text.

    Numbers, booleans, lists and objects become JSON; booleans of a workbook `True` and `False`, as it shows
    them. Lone surrogates become U+FFFD.

    Args:
        value: of the row.
        present: the row has the key.
        in_workbook: it comes from a workbook.
        in_table: it comes from CSV or TSV, where null means that the row is short.

    Example:
        >>> cell_text({"x": 0, "y": [True, None]}).text
        '{"x": 0, "y": [true, null]}'
        >>> cell_text(None).empty
        'null'
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Cell("", "short row" if in_table else "null" if present else "missing key")
    converted = not isinstance(value, str)
    if isinstance(value, str):
        text = value
    elif isinstance(value, bool) and in_workbook:
        text = str(value)
    else:
        text = json.dumps(value, ensure_ascii=False, default=str)
    surrogates = not text.isascii() and _SURROGATE.search(text) is not None
    if surrogates:
        text = legible(text)
    blank = None if text.strip() else "blank" if text else "empty"
    return Cell(text, blank, converted, surrogates)
