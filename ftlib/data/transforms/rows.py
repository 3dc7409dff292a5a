"""What the transforms share: rows as they are taken out, verdicts on them, and fingerprints of results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from ftlib.data.fingerprint import code_fingerprint
from ftlib.data.transforms.report import Records, Step, Transformed, TransformReport
from ftlib.errors import ConfigError

__all__ = ["Row", "Verdict", "fingerprint", "judged", "refuse_others", "row_name", "taken_out"]

Row = Mapping[str, Any]
Verdict = Callable[[Row, int], str | None]  # a row and its position: why it is left out, or None


def refuse_others(step: str, records: Any) -> None:
    """Raise ConfigError unless these are a data set or a stream."""
    if not isinstance(records, (Dataset, IterableDataset)):
        raise ConfigError(
            f"{step}: expected a datasets.Dataset or IterableDataset, got {type(records).__name__}. "
            "Load it with load_records."
        )


def taken_out(row: Row) -> dict[str, Any]:
    """A row without the null keys that a table puts into messages and other nested values."""
    return {name: _without_nulls(value) for name, value in row.items()}


def row_name(row: Row, index: int) -> str:
    """Where a row came from: its `_source`, or its number from 1 on."""
    return str(row.get("_source") or f"row {index + 1}")


def fingerprint(step: str, records: Dataset, *parameters: Any) -> str:
    """Of the result of a step: changes with its parameters, the records and this package's code."""
    inputs = [
        code_fingerprint(),
        step,
        records._fingerprint,
        *parameters,
    ]
    return hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()


def judged(
    records: Records, verdict: Verdict, step: Step, parameters: Iterable[Any], *, whole: bool = False
) -> Transformed:
    """The rows for which `verdict` gives no reason against, counted in `step`.

    Args:
        records: a data set is judged now, a stream as it is read.
        verdict: is called once per row, in order.
        step: counts; those of a stream restart where it is read again.
        parameters: everything that changes the verdicts, as JSON values.
        whole: a verdict depends on the rows before: a stream must be read from its start, by one worker.

    Raises:
        ConfigError: `whole`, and a stream of several shards.
    """
    report = TransformReport((step,))
    if isinstance(records, IterableDataset):
        return Transformed(_stream(records, verdict, step, whole=whole), report)
    rows = (taken_out(row) for row in records.with_format(None))
    kept = [index for index, row in enumerate(rows) if step.add(verdict(row, index))]
    report.check()
    made = fingerprint(step.name, records, *parameters)
    return Transformed(records.select(kept, new_fingerprint=made), report)


def _stream(records: IterableDataset, verdict: Verdict, step: Step, *, whole: bool) -> IterableDataset:
    if whole and records.num_shards > 1:
        raise ConfigError(
            f"{step.name}: expected a stream of one shard, got {records.num_shards}, which workers would "
            "read apart, each blind to the others' rows. Save it to one file, or load it."
        )
    due = 0

    def keeps(row: Row, index: int) -> bool:
        nonlocal due
        if index == 0:
            step.restart()
        elif whole and index != due:
            raise ConfigError(
                f"{step.name}: expected row {due + 1} of the stream, got row {index + 1}: what it is "
                "compared with was not read. Read the stream from its start, or save the result."
            )
        due = index + 1
        return step.add(verdict(taken_out(row), index))

    return records.filter(keeps, with_indices=True)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
