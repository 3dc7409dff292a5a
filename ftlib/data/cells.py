"""Cells of a row, checked: text, messages, tools and numbers.

Each check raises a DataError that names the column, says what was expected and quotes what was found.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ftlib.data.messages import canonical_messages, dicts_of, is_message_list
from ftlib.data.problems import describe
from ftlib.errors import DataError

__all__ = ["Roles", "has", "is_side", "messages", "number", "text", "with_tools"]

Roles = Mapping[str, str]  # spelling of a role -> its canonical name


def has(row: Mapping[str, Any], *columns: str) -> bool:
    """Whether the row has all of these; null counts as absent."""
    return all(row.get(column) is not None for column in columns)


def is_side(value: object) -> bool:
    """Text or a list of messages: what a prompt, a completion or an answer can be."""
    return isinstance(value, str) or is_message_list(value)


def text(value: object, column: str, *, empty: bool = False) -> str:
    """A string; `empty` allows one without a visible character.

    Raises:
        DataError: anything else.
    """
    if not isinstance(value, str):
        raise DataError(
            f"expected text, got {describe(value)}. Remove the row or fill it in.",
            column=column,
            excerpt=describe(value),
        )
    if not empty and not value.strip():
        raise DataError(
            f"expected non-empty text, got {describe(value)}. Remove the row or fill it in.",
            column=column,
            excerpt=value,
        )
    return value


def messages(value: Any, column: str, roles: Roles) -> list[dict[str, Any]]:
    """Canonical messages.

    Raises:
        DataError: no list of messages, or a bad one among them.
    """
    if value is None or not is_message_list(value):
        raise DataError(
            f"expected a list of messages with role and content, got {describe(value)}.",
            column=column,
            excerpt=describe(value),
        )
    return canonical_messages(value, column, roles)


def number(value: object, column: str, *, least: float = -math.inf) -> float:
    """A finite number of at least `least`, as such or as text.

    Raises:
        DataError: anything else.

    Example:
        >>> number("0.5", "margin", least=0)
        0.5
    """
    found = math.nan
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            found = float(value)
        except (ValueError, OverflowError):
            found = math.nan
    if not (math.isfinite(found) and found >= least):
        bound = "" if least == -math.inf else f" >= {least:g}"
        raise DataError(
            f"expected a finite number{bound}, got {describe(value)}.", column=column, excerpt=describe(value)
        )
    return found


def with_tools(row: Mapping[str, Any], canonical: dict[str, Any]) -> dict[str, Any]:
    """`canonical` with the row's tools as JSON text, if it has any.

    Raises:
        DataError: tools that are no list of objects.
    """
    tools = dicts_of(row.get("tools"), "tools")
    return {**canonical, "tools": json.dumps(tools, ensure_ascii=False)} if tools else canonical
