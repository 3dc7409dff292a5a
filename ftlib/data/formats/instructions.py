"""An instruction or a question and its answer in columns of text: they become messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ftlib.data.formats.rule import Converted, FormatOptions, Found, optional, slotted, text, turn
from ftlib.data.problems import describe
from ftlib.errors import DataError

__all__ = ["INSTRUCTION", "QUESTION"]


def _messages(found: Found, _: FormatOptions) -> Converted:
    """System, earlier exchanges, the instruction with its input on the next line, the answer."""
    asked = found.text("asked")
    extra = found.text_or_none("input")
    messages = [turn("user", asked if extra is None else f"{asked}\n{extra}")]
    messages.append(turn("assistant", found.text("answer")))
    for question, answer in reversed(_history(found)):
        messages = [turn("user", question), turn("assistant", answer), *messages]
    system = found.text_or_none("system")
    return {"messages": messages if system is None else [turn("system", system), *messages]}


def _history(found: Found) -> Sequence[Any]:
    """Earlier exchanges, as pairs of question and answer."""
    value = found["history"]
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            value = found["history"]
    pairs = value or []
    if not isinstance(pairs, Sequence) or isinstance(pairs, str) or not all(map(_is_exchange, pairs)):
        raise DataError(
            f"expected a list of pairs of question and answer, got {describe(value)}.",
            column=found.columns["history"],
            excerpt=describe(value),
        )
    return pairs


def _is_exchange(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) == 2
        and all(isinstance(each, str) for each in value)
    )


INSTRUCTION = slotted(
    "instruction",
    {
        "asked": text("instruction"),
        "answer": text("output", "response"),
        "input": optional("input", "context"),
        "system": optional("system", "system_prompt"),
        "history": optional("history"),
    },
    _messages,
    keys="instruction + (output | response)",
    known_as="Alpaca, Dolly",
    columns=("messages",),
    number=14,
    any_case=True,
)
QUESTION = slotted(
    "question",
    {
        "asked": text("question", "query"),
        "answer": text("answer", "response"),
        "input": optional("context"),
        "system": optional("system", "system_prompt"),
        "history": optional("history"),
    },
    _messages,
    keys="(question | query) + (answer | response)",
    known_as="question answering, OpenOrca",
    columns=("messages",),
    number=18,
)
