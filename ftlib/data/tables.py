"""Python rows to an Arrow-backed data set without losing a type on the way.

Arrow wants one type per column. Where values differ in type, or are nested in a way that would be
coerced, the column holds JSON text; nothing is turned into a float or a null to fit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value

__all__ = ["to_dataset"]

_SCALARS = {str: "string", bool: "bool", int: "int64", float: "float64"}
_INT64 = range(-(2**63), 2**63)
_MESSAGE_KEYS = ("role", "content", "weight", "tool_calls", "tool_call_id", "name", "reasoning", "extra")
_MESSAGE_COLUMNS = ("messages", "prompt", "completion", "chosen", "rejected")


def to_dataset(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """Rows as a data set in memory, its fingerprint a hash of its content.

    Columns are the keys in order of first appearance; an absent key is null.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns, features = {}, Features()
    for name in names:
        values = [row.get(name) for row in rows]
        features[name], columns[name] = _column(name, values)
    schema = features.arrow_schema
    table = pa.table(
        {name: pa.array(columns[name], type=schema.field(name).type) for name in names}, schema=schema
    )
    return Dataset(table, fingerprint=_fingerprint(names, columns))


def _column(name: str, values: list[Any]) -> tuple[Any, list[Any]]:
    present = [value for value in values if value is not None]
    if name in _MESSAGE_COLUMNS and present and all(map(_is_messages, present)):
        return _messages(present), values
    if name == "segments" and present and all(map(_are_spans, present)):
        return List({"text": Value("string"), "weight": Value("float64")}), values
    if name == "answers" and present and all(map(_are_messages, present)):
        return List(_messages([answer for value in present for answer in value])), values
    kind = _scalar(present)
    if kind is not None:
        return Value(kind), values
    if all(isinstance(value, list) for value in present):
        inner = _scalar([item for value in present for item in value])
        if inner is not None:
            return List(Value(inner)), values
    texts = [
        None if value is None else value if isinstance(value, str) and name == "tools" else _json(value)
        for value in values
    ]
    return Value("string"), texts


def _messages(lists: Sequence[Sequence[Mapping[str, Any]]]) -> Any:
    """The type of message lists: the keys that any message has."""
    keys = {key for messages in lists for message in messages for key in message}
    return List(
        {key: Value("float64" if key == "weight" else "string") for key in _MESSAGE_KEYS if key in keys}
    )


def _is_messages(value: Any) -> bool:
    """Messages as `canonical_messages` gives them."""
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and set(message) <= set(_MESSAGE_KEYS)
        and all(isinstance(item, float if key == "weight" else str) for key, item in message.items())
        for message in value
    )


def _are_spans(value: Any) -> bool:
    """Stretches of text with a weight each."""
    return isinstance(value, list) and all(
        isinstance(span, dict)
        and set(span) == {"text", "weight"}
        and isinstance(span["text"], str)
        and isinstance(span["weight"], float)
        for span in value
    )


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_messages, value))


def _scalar(values: Sequence[Any]) -> str | None:
    """The one type of all values, or `None`."""
    types = {type(value) for value in values}
    if not types:
        return "string"
    if len(types) > 1 or not types <= set(_SCALARS):
        return None
    if types == {int} and any(value not in _INT64 for value in values):
        return None
    return _SCALARS[types.pop()]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _fingerprint(names: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> str:
    digest = hashlib.blake2b(json.dumps(names).encode(), digest_size=8)
    for name in names:
        for value in columns[name]:
            digest.update(_json(value).encode() + b"\n")
    return digest.hexdigest()
