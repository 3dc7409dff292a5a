"""Records in the form that TRL's own trainers take.

Left out: what TRL has no form for is refused, never dropped: message weights, weighted segments, ranked
answers (make pairs: ``load_records(..., pairs="best_worst")``), pairs of token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, Json, List, Value

from ftlib.data.messages import dicts_of, restored
from ftlib.data.records import load_records
from ftlib.errors import CapabilityError

__all__ = ["to_trl"]

_MESSAGES = ("messages", "prompt", "completion", "chosen", "rejected")
_FORMS = (  # what TRL's trainers read, the first that a data set has whole
    ("input_ids", "labels"),
    ("messages",),
    ("prompt", "completion", "label"),
    ("prompt", "completion"),
    ("prompt", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("prompt",),
    ("text",),
)
_PLAIN = {"role", "content"}  # keys of messages that need no JSON
_OURS = ("_source", "loss_weights")


def to_trl(records: Any) -> Dataset:
    r"""Records for TRL's trainers: `messages`; `prompt` and `completion`, with a true or false `label` for
    KTO; `[prompt,] chosen, rejected[, margin]`; `prompt`; `text`; or `input_ids` and `labels`.

    Messages are as chat templates read them, without null keys; `tools` and `tool_calls` are objects. Other
    columns stay, for reward functions; `_source` goes.

    Args:
        records: of `load_records`, or anything that it takes.

    Raises:
        CapabilityError: records that TRL has no form for.
        DataError: as `load_records`.

    Example:
        >>> to_trl([{"instruction": "Add.", "input": "1 2", "output": "3"}])[0]["messages"][0]
        {'role': 'user', 'content': 'Add.\n1 2'}
    """
    if not isinstance(records, Dataset) or "_source" not in records.column_names:
        records = load_records(records)
    rows = [_row(row) for row in records.with_format(None)]
    form = _form(records.column_names, rows)
    others = [name for name in records.column_names if name not in (*form, "tools", "margin", *_OURS)]
    names = [*form, *(name for name in ("tools", "margin") if name in records.column_names), *others]
    features = Features(
        {name: records.features[name] if name in others else _feature(name, rows, records) for name in names}
    )
    columns = {name: [row.get(name) for row in rows] for name in names}
    return Dataset.from_dict(columns, features=features)


def _form(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    form = next((form for form in _FORMS if set(form) <= set(columns)), None)
    if form == ("prompt", "completion", "label") and not all(isinstance(row["label"], bool) for row in rows):
        form = ("prompt", "completion")
    unreadable = {"segments", "answers", "completions", "chosen_ids"} & set(columns)
    if form is None or (form == ("prompt",) and unreadable):
        raise CapabilityError(
            f"to_trl: expected one of the forms {'; '.join(' + '.join(form) for form in _FORMS)}, found the "
            f"columns {list(columns)}. Of ranked answers, make pairs: load_records(..., pairs='best_worst')."
        )
    return form


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(row)
    for name in _MESSAGES:
        if isinstance(row.get(name), list):
            made[name] = [_message(message, f"{name}[{k}]", row) for k, message in enumerate(row[name])]
    if row.get("tools") is not None:
        made["tools"] = dicts_of(row["tools"], "tools")
    if any(weight not in (0.0, 1.0) for weight in row.get("loss_weights") or ()):
        raise _weighted("loss_weights", row)
    return made


def _message(stored: Mapping[str, Any], column: str, row: Mapping[str, Any]) -> dict[str, Any]:
    message = restored(stored, column)
    weight = message.pop("weight", None)
    if weight not in (None, float(message["role"] == "assistant")):
        raise _weighted(f"{column}.weight", row)
    for name in ("reasoning", "thinking"):  # said by `reasoning_content` too
        message.pop(name, None)
    return message


def _weighted(column: str, row: Mapping[str, Any]) -> CapabilityError:
    return CapabilityError(
        f"to_trl: expected text without loss weights, which TRL has no form for, got some in {column} of "
        f"{row.get('_source')}. Remove them, or encode with ft.Encoder and give TRL input_ids and labels."
    )


def _feature(name: str, rows: Sequence[Mapping[str, Any]], records: Dataset) -> Any:
    values = [row[name] for row in rows if row.get(name) is not None]
    if name == "tools":
        return List(Json())
    if name in _MESSAGES and values and isinstance(values[0], list):
        keys = {key for messages in values for message in messages for key in message}
        return List({key: Value("string") for key in ("role", "content")}) if keys <= _PLAIN else List(Json())
    return records.features[name]
