"""Streams of rows to streams of records: the first rows decide the format, the rest follow as they are read.

A stream may be read any number of times, by any number of workers: each pass begins the file of rejected rows
anew, and each worker writes its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import IterableDataset

from ftlib.data.loading.choose import LOOKED_AT
from ftlib.data.loading.convert import Converter
from ftlib.data.loading.outcome import Outcome
from ftlib.data.loading.rejects import OnError, add_rejected, check_share, of_worker
from ftlib.data.loading.sources import Source, plain_row
from ftlib.data.problems import gathered
from ftlib.data.reading import Located, Place
from ftlib.errors import DataError

__all__ = ["streamed"]

_NAME = "<stream>"
_BATCH = 64  # rows converted ahead of the reader
_COUNTED = 1000  # rows from which on the share of bad ones means something
_log = logging.getLogger(__name__)


def streamed(
    source: IterableDataset,
    converter: Callable[[Sequence[Located], Source], Converter],
    on_error: OnError,
    max_bad: float | None,
    rejected_file: Path | None,
) -> IterableDataset:
    """The stream converted as it is read.

    Bad rows are raised with those of their batch, or skipped, logged and added to `rejected_file`; more of
    them than `max_bad` of the rows so far (counted as 1,000 at least) raise too.

    Raises:
        DataError: a stream without rows, or in no known format; while it is read, bad rows.
    """
    first = [_located(row, k, source) for k, row in enumerate(islice(iter(source), LOOKED_AT))]
    if not first:
        raise DataError("expected rows, got none.", code="empty_data", file=_NAME)
    convert = converter(first, Source(source))
    total = Outcome(0)

    def records(batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        outcome = Outcome(len(rows))
        if indices[0] == 0:  # another pass
            total.rows = 0
            total.rejects.clear()
            if rejected_file is not None:
                of_worker(rejected_file).unlink(missing_ok=True)
        for row, index in zip(rows, indices, strict=True):
            outcome.add(_located(row, index, source), convert)
        _settle(outcome, total, on_error, max_bad)
        if outcome.rejects and rejected_file is not None:
            add_rejected(outcome.rejects, of_worker(rejected_file))
        names = list(dict.fromkeys(name for record in outcome.records for name in record))
        return {name: [record.get(name) for record in outcome.records] for name in names}

    columns = source.column_names or list(dict.fromkeys(name for row in first for name in _keys(row)))
    return source.map(records, batched=True, batch_size=_BATCH, with_indices=True, remove_columns=columns)


def _settle(outcome: Outcome, total: Outcome, on_error: OnError, max_bad: float | None) -> None:
    problems = [error for _, error in outcome.rejects]
    if problems and on_error == "raise":
        raise gathered(problems)
    total.rows += outcome.rows
    total.rejects += outcome.rejects
    check_share([error for _, error in total.rejects], max(total.rows, _COUNTED), max_bad)
    for error in problems:
        _log.warning("load_records: skipped %s", error)
    for reason, count in outcome.dropped.items():
        _log.info("load_records: dropped %d: %s", count, reason)


def _located(row: Mapping[str, Any], index: int, source: IterableDataset) -> Located:
    return Located(Place(_NAME, index + 1), plain_row(row, source.features))


def _keys(row: Located) -> Sequence[str]:
    return list(row.value) if isinstance(row.value, dict) else []
