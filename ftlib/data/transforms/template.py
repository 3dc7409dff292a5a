"""A formatter applied once, its text written into rows, so that sources of many forms become one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from ftlib.data.problems import gathered
from ftlib.data.segments import Conversation, Segments, Skipped
from ftlib.data.tables import to_dataset
from ftlib.data.transforms.report import Records, Step, Transformed, TransformReport
from ftlib.data.transforms.rows import Row, refuse_others, row_name, taken_out
from ftlib.errors import DataError

__all__ = ["template"]


def template(records: Records, formatter: Callable[[Row], Any]) -> Transformed:
    """Records as the formatter lays them out: `prompt` and `completion`, `text`, or `messages` with `tools`.

    The encoder makes the same ids and weights of the result, without a formatter, as of the records with
    `formatter`; only a limit of length may cut them elsewhere. `_source` stays, other columns do not.

    Args:
        records: records or a stream of them.
        formatter: any formatter, such as ``ft.formatters.instruction()``, or a function from a row.

    Raises:
        DataError: the rows that the formatter refuses, all at once (of a stream, when they are read); rows
            whose layout no columns hold: comparisons, explicit weights, control tokens, no EOS, a template of
            its own; rows of different kinds.
    """
    refuse_others("template", records)
    step = Step("template")
    report = TransformReport((step,))
    if isinstance(records, IterableDataset):
        return Transformed(_stream(records, formatter, step), report)
    return Transformed(_data_set(records, formatter, step, report), report)


def _data_set(
    records: Dataset, formatter: Callable[[Row], Any], step: Step, report: TransformReport
) -> Dataset:
    made: list[dict[str, Any]] = []
    problems: list[DataError] = []
    for index, row in enumerate(records.with_format(None)):
        try:
            written = _written(taken_out(row), index, formatter, step)
        except DataError as error:
            problems.append(error)
            continue
        if written is not None:
            made.append(written)
            if set(written) != set(made[0]):
                problems.append(_other_kind(written, made[0]))
    if problems:
        raise gathered(problems)
    report.check()
    if not made:
        raise DataError("template: expected rows, got none: the formatter skips all.", code="empty_data")
    return to_dataset(made)


def _stream(records: IterableDataset, formatter: Callable[[Row], Any], step: Step) -> IterableDataset:
    first: set[str] = set()

    def write(batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        if indices[0] == 0:
            step.restart()
        rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        made = [
            _written(taken_out(row), index, formatter, step) for row, index in zip(rows, indices, strict=True)
        ]
        kept = [row for row in made if row is not None]
        for row in kept:
            first.update(() if first else row)
            if set(row) != first:
                raise _other_kind(row, first)
        return {name: [row[name] for row in kept] for name in first}

    columns = records.column_names or list(next(iter(records)))
    return records.map(write, batched=True, batch_size=1, with_indices=True, remove_columns=columns)


def _written(row: Row, index: int, formatter: Callable[[Row], Any], step: Step) -> dict[str, Any] | None:
    """The columns of one row; `None` where the formatter skips it."""
    source = row_name(row, index)
    try:
        made = formatter(row)
        if isinstance(made, Skipped):
            step.add(made.reason)
            step.show(made.reason, source)
            return None
        columns = _of_conversation(made) if isinstance(made, Conversation) else _of_segments(made)
    except DataError as error:
        file, _, number = source.rpartition(":")
        raise DataError(
            error.message,
            code=error.code,
            file=file or "<records>",
            row=int(number) if number.isdigit() else index + 1,
            column=error.column,
            excerpt=error.excerpt,
        ) from error
    step.add(None)
    return {**columns, "_source": source}


def _of_segments(made: Any) -> dict[str, Any]:
    if not isinstance(made, Segments):
        raise _no_columns(f"{type(made).__name__}", "Give the records to the encoder with this formatter.")
    start = next((k for k, part in enumerate(made.parts) if part.boundary), len(made.parts))
    before, after = made.parts[:start], made.parts[start:]
    roles = ({part.role for part in before}, {part.role for part in after})
    kept = {"text": ({"text"}, set()), "prompt": ({"prompt"}, set()), "both": ({"prompt"}, {"completion"})}
    kind = next((name for name, wanted in kept.items() if roles == wanted), None)
    unheld = [
        what
        for what, found in {
            "a layout other than text, or prompt and completion": kind is None,
            "explicit weights": any(part.weight is not None for part in made.parts),
            "control tokens": any(part.control for part in made.parts),
            "no BOS": not made.bos,
            "no EOS": not made.eos,
            "an ending of the tokenizer's own": made.closed,
            "boundaries inside the completion": any(part.boundary for part in after[1:]),
        }.items()
        if found
    ]
    if unheld:
        raise _no_columns(" and ".join(unheld), "Give the records to the encoder with this formatter.")
    if kind == "both":
        return {"prompt": _joined(before), "completion": _joined(after)}
    return {str(kind): made.text}


def _of_conversation(made: Conversation) -> dict[str, Any]:
    if made.template is not None or made.system == "":
        raise _no_columns(
            "a chat template or empty system text of its own", "Give these to the encoder's chat()."
        )
    messages = [dict(message) for message in made.messages]
    if made.system is not None and all(message["role"] != "system" for message in messages):
        messages = [{"role": "system", "content": made.system}, *messages]
    given = made.given + len(messages) - len(made.messages) if made.given else 0
    tools = {} if made.tools is None else {"tools": list(made.tools)}
    if not given:
        return {"messages": messages, **tools}
    if given == len(messages):
        return {"prompt": messages, **tools}
    return {"prompt": messages[:given], "completion": messages[given:], **tools}


def _joined(parts: Sequence[Any]) -> str:
    return "".join(part.text for part in parts)


def _no_columns(found: str, fix: str) -> DataError:
    return DataError(
        f"template: expected a layout that plain columns hold, got {found}. {fix}", code="template"
    )


def _other_kind(row: Mapping[str, Any], first: Any) -> DataError:
    return DataError(
        f"template: expected the columns {sorted(first)}, as in the first row, got {sorted(row)}. Use one "
        "formatter per kind of row.",
        code="bad_row",
    )
