"""What a row asks and what it says, as text to compare rows by.

Rows are canonical: `text`; `prompt` and perhaps `completion` or `completions`; `messages`; `[prompt,] chosen,
rejected`; `prompt` and `answers`; `question` and `choices`; `text` or `text_a` and `text_b` with a `label`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from ftlib.data.preferences import leading
from ftlib.data.transforms.normalise import normalise
from ftlib.errors import DataError

__all__ = ["SAYING", "asked", "parts", "prompt_columns", "prompt_key", "prompt_parts", "questions", "texts"]

Row = Mapping[str, Any]
Side = str | Sequence[Mapping[str, Any]]

_ASKING = ("prompt", "messages", "text", "question", "text_a")  # what stands for the prompt, in this order
_OTHERS = ("rejected", "answers", "completions")
SAYING = (
    "text",
    "text_a",
    "text_b",
    "question",
    "choices",
    "prompt",
    "messages",
    "completion",
    "chosen",
    *_OTHERS,
)


def prompt_columns(columns: Sequence[str]) -> list[str]:
    """The columns that tell the prompt of a row.

    Raises:
        DataError: ``missing_column``: there are none.
    """
    if {"chosen", "rejected"} <= set(columns):
        return [name for name in ("prompt", "chosen", "rejected") if name in columns]
    found = [name for name in _ASKING if name in columns][:1]
    if not found:
        raise DataError(
            f"expected a column 'prompt', 'messages' or 'text', found {sorted(columns)}. "
            "Name a column, or load the data with load_records.",
            code="missing_column",
            column="prompt",
        )
    return found


def asked(row: Row) -> Side:
    """The prompt of a row: for `messages`, the turns before the first answer; for `text`, the text; for pairs
    without a prompt, what both sides begin with: whole words, whole messages.
    """
    if "chosen" in row and "rejected" in row and row.get("prompt") is None:
        chosen, rejected = row["chosen"], row["rejected"]
        if not isinstance(chosen, str):
            return leading(chosen, rejected)
        common = "".join(leading(chosen, rejected))
        return common[: max((at for at, char in enumerate(common) if char.isspace()), default=0)]
    value = next((row[name] for name in _ASKING if row.get(name) is not None), "")
    return value if isinstance(value, str) else list(takewhile(_is_asking, value))


def prompt_key(prompt: Side) -> str:
    """What rows of one prompt share: its normalised text, or that of each turn before the first answer."""
    if isinstance(prompt, str):
        return normalise(prompt)
    turns = [[turn["role"], normalise(_content(turn))] for turn in takewhile(_is_asking, prompt)]
    return json.dumps(turns, ensure_ascii=False)


def prompt_parts(prompt: Side) -> list[tuple[str, str]]:
    """The prompt for `near_duplicates`. System text, long and shared, would make all rows alike: left out."""
    if isinstance(prompt, str):
        return [("", prompt)]
    turns = [turn for turn in takewhile(_is_asking, prompt) if turn["role"] != "system"]
    return [("", "\n".join(map(_content, turns)))]


def parts(row: Row) -> list[tuple[str, str]]:
    """Prompt plus completion for `near_duplicates`.

    Rows of different labels, right choices or system texts share nothing, and a rejected answer shares
    nothing with a chosen one: such rows teach different things.
    """
    system = [_content(turn) for name in SAYING for turn in _turns(row.get(name)) if turn["role"] == "system"]
    verdicts = [str(row[name]) for name in ("label", "labels", "answer") if row.get(name) is not None]
    mark = "\0".join(normalise(text) for text in [*system, *verdicts])
    said = "\n".join(_said(row[name]) for name in SAYING if name not in _OTHERS and row.get(name) is not None)
    others = [row.get("rejected"), *(row.get("answers") or ()), *(row.get("completions") or ())]
    return [
        (mark, said),
        *((f"{mark}\0other {k}", _said(value)) for k, value in enumerate(others) if value is not None),
    ]


def texts(row: Row, columns: Sequence[str] | None = None) -> list[str]:
    """Every text of a row, in reading order: one per field, answer and message.

    Args:
        row: a canonical row.
        columns: these alone; `None` takes the canonical ones.
    """
    found: list[str] = []
    for name in SAYING if columns is None else columns:
        found += _flat(row.get(name))
    return found


def questions(row: Row) -> list[str]:
    """What a row asks, each text for itself: prompt or text, and every turn of a user or tool."""
    turns = [turn for name in ("prompt", "messages") for turn in _turns(row.get(name))]
    said = [row[name] for name in ("prompt", "text") if isinstance(row.get(name), str)]
    return [*said, *(_content(turn) for turn in turns if turn["role"] not in ("assistant", "system"))]


def _flat(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return _flat(value.get("content"))
    if isinstance(value, Sequence):
        return [text for item in value for text in _flat(item)]
    return [str(value)]


def _said(value: Any) -> str:
    """A side without its system messages."""
    is_system = [turn for turn in _turns(value) if turn["role"] == "system"]
    return "\n".join(_flat([item for item in value if item not in is_system] if is_system else value))


def _turns(value: Any) -> list[Mapping[str, Any]]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return []
    return [item for item in value if isinstance(item, Mapping) and "role" in item]


def _is_asking(turn: Mapping[str, Any]) -> bool:
    return bool(turn["role"] != "assistant")


def _content(turn: Mapping[str, Any]) -> str:
    return str(turn.get("content") or "")
