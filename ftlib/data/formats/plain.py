"""A prompt alone, and text alone."""

from __future__ import annotations

from ftlib.data import cells
from ftlib.data.cells import has
from ftlib.data.formats.rule import (
    Converted,
    FormatOptions,
    Found,
    Rule,
    compares,
    side,
    slotted,
    text,
)
from ftlib.data.messages import is_message_list
from ftlib.data.segments import Row
from ftlib.errors import DataError

__all__ = ["CONTENT", "PROMPT", "RAW_CONTENT", "TEXT"]

_MORE = ("prompt", "completion", "messages")


def _prompt(found: Found, options: FormatOptions) -> Converted:
    if has(found.row, "completion"):
        raise DataError(
            "expected a prompt alone, as in the other rows, got a completion too.", column="completion"
        )
    if is_message_list(found["prompt"]):
        return cells.with_tools(found.row, {"prompt": found.messages("prompt", options)})
    return {"prompt": found.text("prompt")}


def _text(found: Found, _: FormatOptions) -> Converted:
    return {"text": found.text("text")}


def _has_more(row: Row) -> bool:
    is_message = has(row, "message_id") and "parent_id" in row  # of a tree, read only by name
    return is_message or any(has(row, name) for name in _MORE) or compares(row)


def _named_text(column: str) -> Rule:
    return slotted(
        column,
        {"text": text(column)},
        _text,
        keys=f"{column}, as text",
        known_as="raw text under another name",
        columns=("text",),
    )


PROMPT = slotted(
    "prompt",
    {"prompt": side("prompt")},
    _prompt,
    keys="prompt alone",
    known_as="PPO, RLVR",
    columns=("prompt",),
    number=22,
    unless=lambda row: has(row, "completion") or has(row, "messages") or compares(row),
)
TEXT = slotted(
    "text",
    {"text": text("text")},
    _text,
    keys="text alone",
    known_as="raw text",
    columns=("text",),
    number=23,
    unless=_has_more,
)
CONTENT, RAW_CONTENT = (_named_text(column) for column in ("content", "raw_content"))
