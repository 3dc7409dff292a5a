"""Text in stretches with a weight each, free of any template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ftlib.data.formats.rule import Converted, FormatOptions, Found, Slot, slotted
from ftlib.data.problems import describe
from ftlib.data.segments import Row
from ftlib.errors import DataError

__all__ = ["SEGMENTS", "WEIGHTED_TEXT"]


def _is_spans(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(
            isinstance(item, Mapping)
            and isinstance(item.get("text"), str)
            and (item.get("label") is not None or item.get("weight") is not None)
            for item in value
        )
    )


def _segments(found: Found, _: FormatOptions) -> Converted:
    value = found["segments"]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(
            f"expected a list of objects with text and label, got {describe(value)}.", column="segments"
        )
    return {"segments": [_span(item, f"segments[{k}]") for k, item in enumerate(value)]}


def _span(item: Any, column: str) -> dict[str, Any]:
    if not isinstance(item, Mapping) or not isinstance(item.get("text"), str):
        raise DataError(f"expected an object with text and label, got {describe(item)}.", column=column)
    label = item.get("label") if item.get("weight") is None else item["weight"]
    return {"text": item["text"], "weight": _weight(label, column)}


def _weight(value: Any, column: str) -> float:
    if not isinstance(value, bool | int | float) or not 0.0 <= value < math.inf:
        raise DataError(
            f"expected a label true or false, or a weight >= 0, got {describe(value)}.", column=column
        )
    return float(value)


def _is_listed(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("text_list"), list)
        and isinstance(value.get("loss_weights"), list)
    )


def _weighted(found: Found, _: FormatOptions) -> Converted:
    value = found["data"]
    if isinstance(value, str):
        return {"segments": [{"text": found.text("data"), "weight": 1.0}]}
    texts, weights = (value.get(key) if isinstance(value, Mapping) else None for key in _LISTS)
    if not isinstance(texts, list) or not isinstance(weights, list) or len(texts) != len(weights):
        raise DataError(
            f"expected text, or text_list and loss_weights of one length, got {describe(value)}.",
            column="data",
            excerpt=describe(value),
        )
    pairs = enumerate(zip(texts, weights, strict=True))
    return {"segments": [_span({"text": a, "weight": b}, f"data[{k}]") for k, (a, b) in pairs]}


_LISTS = ("text_list", "loss_weights")


def _has_other_text(row: Row) -> bool:
    """`data` as plain text is a common name for anything, so nothing else may hold text."""
    if not isinstance(row.get("data"), str):
        return False
    return any(
        isinstance(value, str | list | dict) for name, value in row.items() if name not in ("data", "_source")
    )


SEGMENTS = slotted(
    "segments",
    {"segments": Slot(("segments",), _is_spans)},
    _segments,
    keys="segments: [{text, label}]",
    known_as="template-free",
    columns=("segments",),
    number=2,
)
WEIGHTED_TEXT = slotted(
    "weighted_text",
    {"data": Slot(("data",), lambda value: isinstance(value, str) or _is_listed(value))},
    _weighted,
    keys="data: text or {text_list, loss_weights}",
    known_as="template-free",
    columns=("segments",),
    number=2,
    unless=_has_other_text,
)
