"""Completions with a judgement: of every step (process reward models), or good or bad (KTO)."""

from __future__ import annotations

from typing import Any

from ftlib.data import cells
from ftlib.data.cells import is_side
from ftlib.data.formats.chats import is_chat, turns_in
from ftlib.data.formats.rule import Converted, FormatOptions, Found, Slot, optional, side, slotted
from ftlib.data.messages import role_of
from ftlib.data.problems import describe
from ftlib.errors import DataError

__all__ = ["KTO", "KTO_MESSAGES", "STEPS"]

_WORDS = {"true": True, "false": False}


def _as_bool(value: object) -> bool | None:
    """True or false, also as text, as tables have it; `None` for anything else."""
    if isinstance(value, str):
        return _WORDS.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def _label(found: Found) -> bool:
    label = _as_bool(found["label"])
    if label is None:
        raise DataError(
            f"expected true (good) or false (bad), got {describe(found['label'])}.",
            column=found.columns["label"],
            excerpt=describe(found["label"]),
        )
    return label


def _completion(found: Found, options: FormatOptions) -> Converted:
    prompt = found.side("prompt", options, empty=True)
    completion = found.side("completion", options)
    if isinstance(prompt, str) != isinstance(completion, str):
        raise DataError(
            "expected prompt and completion both as text or both as messages, got one of each.",
            column=found.columns["completion"],
        )
    return cells.with_tools(found.row, {"prompt": prompt, "completion": completion, "label": _label(found)})


def _conversation(found: Found, options: FormatOptions) -> Converted:
    messages = turns_in(found, options)
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise DataError(
            "expected messages that end in the answer that is judged, got none at the end.",
            column=found.columns["messages"],
        )
    judged = {"prompt": messages[:-1], "completion": messages[-1:], "label": _label(found)}
    return cells.with_tools(found.row, judged)


def _ends_in_answer(value: Any) -> bool:
    return is_chat(value) and isinstance(value, list) and role_of(value[-1]) == "assistant"


_LABEL = Slot(("label", "kto_tag"), lambda value: _as_bool(value) is not None)
KTO = slotted(
    "kto",
    {"prompt": side("prompt"), "completion": side("completion"), "label": _LABEL},
    _completion,
    keys="prompt + completion + (label | kto_tag), true or false",
    known_as="KTO",
    columns=("prompt", "completion", "label"),
    number=12,
)
KTO_MESSAGES = slotted(
    "kto_messages",
    {
        "messages": Slot(("messages", "conversations"), _ends_in_answer),
        "label": _LABEL,
        "system": optional("system", "system_prompt"),
    },
    _conversation,
    keys="messages + (label | kto_tag), true or false",
    known_as="KTO",
    columns=("prompt", "completion", "label"),
    number=12,
)


def _steps(found: Found, options: FormatOptions) -> Converted:
    steps, labels = found["completions"], found["labels"]
    if not isinstance(steps, list) or not isinstance(labels, list) or len(steps) != len(labels) or not steps:
        sizes = [len(value) if isinstance(value, list) else describe(value) for value in (steps, labels)]
        raise DataError(
            f"expected completions and labels as lists of one length, got {sizes[0]} and {sizes[1]}.",
            column="labels",
        )
    for k, (step, label) in enumerate(zip(steps, labels, strict=True)):
        cells.text(step, f"completions[{k}]")
        if not isinstance(label, bool | int | float):
            raise DataError(f"expected a label per step, got {describe(label)}.", column=f"labels[{k}]")
    prompt = found.side("prompt", options, empty=True)
    return {"prompt": prompt, "completions": list(steps), "labels": list(labels)}


STEPS = slotted(
    "steps",
    {
        "prompt": Slot(("prompt",), is_side),
        "completions": Slot(("completions",), lambda value: isinstance(value, list)),
        "labels": Slot(("labels",), lambda value: isinstance(value, list)),
    },
    _steps,
    keys="prompt + completions + labels, lists of equal length",
    known_as="process reward models",
    columns=("prompt", "completions", "labels"),
    number=11,
)
