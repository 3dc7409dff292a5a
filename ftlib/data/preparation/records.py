"""The prepared rows as a data set that is mapped from disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ftlib.data.preparation.run import Outcome

__all__ = ["to_records"]

_BATCH = 10_000


def to_records(outcome: Outcome, folder: Path) -> object:
    """A `datasets.Dataset` of the rows that are left, with `_source`."""
    if not outcome.context.is_pairs:
        from ftlib.data.records import load_records

        return load_records(
            [_row(outcome, row.number, row.completion) for row in outcome.context.table.rows()]
        )
    import pyarrow as pa
    from datasets import Dataset

    schema = pa.schema([(name, pa.string()) for name in ("prompt", "completion", "_source")])
    path = folder / "records.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        rows = _rows(outcome)
        while batch := list(islice(rows, _BATCH)):
            columns = [pa.array(column, pa.string()) for column in zip(*batch, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return Dataset.from_file(str(path))


def _rows(outcome: Outcome) -> Iterator[tuple[str, str, str]]:
    place = outcome.context.intake.spool.place
    for row in outcome.context.table.rows():
        yield row.prompt, row.completion, str(place(row.number))


def _row(outcome: Outcome, index: int, text: str) -> dict[str, object]:
    return {**json.loads(text), "_source": str(outcome.context.intake.spool.place(index))}
