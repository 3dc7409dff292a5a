"""Texts with a class, and questions with choices."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any

from ftlib.data import cells
from ftlib.data.formats.rule import Converted, FormatOptions, Found, Slot, slotted, text
from ftlib.data.problems import describe
from ftlib.errors import DataError

__all__ = ["CHOICES", "LABELLED", "LABELLED_PAIR"]

Choices = tuple[list[str], list[str]]  # texts, and the labels they go by


def _choices(found: Found, _: FormatOptions) -> Converted:
    texts, labels = _read(found["choices"])
    return {
        "question": found.text("question"),
        "choices": texts,
        "answer": _index(found["answer"], texts, labels, found.columns["answer"]),
    }


def _read(value: Any) -> Choices:
    given = value.get("text") if isinstance(value, Mapping) else value
    labels = value.get("label") if isinstance(value, Mapping) else []
    if not isinstance(given, list) or len(given) < 2 or not isinstance(labels, list):
        raise DataError(
            f"expected a list of at least two choices, got {describe(value)}.",
            column="choices",
            excerpt=describe(value),
        )
    texts = [cells.text(choice, f"choices[{k}]") for k, choice in enumerate(given)]
    if labels and len(labels) != len(texts):
        raise DataError(
            f"expected one label per choice ({len(texts)}), got {len(labels)}.", column="choices.label"
        )
    return texts, [str(label) for label in labels]


def _index(answer: Any, texts: Sequence[str], labels: Sequence[str], column: str) -> int:
    """Which choice is right: a position from 0, a label, a letter, or the text itself.

    Raises:
        DataError: none of these, or two of them that differ.
    """
    places: set[int] = set()
    if isinstance(answer, int) and not isinstance(answer, bool):
        places = {answer} & set(range(len(texts)))
    elif isinstance(answer, str):
        said = answer.strip()
        places = {k for k, label in enumerate(labels) if label == said}
        if not places:
            places = {k for k, choice in enumerate(texts) if choice.strip() == said}
            letter = string.ascii_uppercase.find(said) if len(said) == 1 else -1
            number = int(said) if said.isdecimal() else -1
            places |= {k for k in (letter, number) if 0 <= k < len(texts)}
    if len(places) != 1:
        what = "none" if not places else f"several ({sorted(places)})"
        raise DataError(
            f"expected the position (from 0), letter or text of one of {len(texts)} choices, got "
            f"{describe(answer)}, which is {what} of them.",
            column=column,
            excerpt=describe(answer),
        )
    return places.pop()


def _labelled(found: Found, _: FormatOptions) -> Converted:
    return {"text": found.text("text"), "label": _label(found)}


def _pair(found: Found, _: FormatOptions) -> Converted:
    return {"text_a": found.text("a"), "text_b": found.text("b"), "label": _label(found)}


def _label(found: Found) -> Any:
    if not _is_label(found["label"]) or found["label"] == "":
        raise DataError(
            f"expected a label, got {describe(found['label'])}. Remove the row or fill it in.",
            column="label",
            excerpt=describe(found["label"]),
        )
    return found["label"]


def _is_label(value: object) -> bool:
    if isinstance(value, list):
        return all(isinstance(each, str | int) for each in value)
    return isinstance(value, str | int)


_LABEL = Slot(("label",), _is_label)
CHOICES = slotted(
    "choices",
    {
        "question": text("question"),
        "choices": Slot(("choices",), lambda value: isinstance(value, list | Mapping)),
        "answer": Slot(("answer", "answerKey"), lambda value: isinstance(value, str | int)),
    },
    _choices,
    keys="question + choices + (answer | answerKey)",
    known_as="MMLU, ARC",
    columns=("question", "choices", "answer"),
    number=17,
)
LABELLED = slotted(
    "labelled",
    {"text": text("text", "sentence"), "label": _LABEL},
    _labelled,
    keys="(text | sentence) + label",
    known_as="GLUE",
    columns=("text", "label"),
    number=21,
)
LABELLED_PAIR = slotted(
    "labelled_pair",
    {
        "a": text("text_a", "premise", "sentence1", "question1"),
        "b": text("text_b", "hypothesis", "sentence2", "question2"),
        "label": _LABEL,
    },
    _pair,
    keys="(text_a + text_b | premise + hypothesis | sentence1 + sentence2) + label",
    known_as="GLUE",
    columns=("text_a", "text_b", "label"),
    number=21,
)
