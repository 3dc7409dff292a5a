"""Parquet: typed rows, read in batches."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ftlib.data.problems import describe
from ftlib.data.reading.files import SourceFile
from ftlib.data.reading.located import Facts, Located, Opened, Place, ReadOptions

__all__ = ["open_parquet"]


def open_parquet(file: SourceFile, _: ReadOptions) -> Opened:
    """A table; rows are numbered from 1.

    Raises:
        DataError: ``file_corrupt``.
    """
    with _parquet(file) as table:
        header = tuple(table.schema_arrow.names)

    def rows(_: Counter[str]) -> Iterator[Located]:
        number = 0
        with _parquet(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield Located(Place(file.name, number), row)

    return Opened(Facts(file.name, "parquet", "table", file.compression, header=header), rows)


@contextmanager
def _parquet(file: SourceFile) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import parquet

    source = io.BytesIO(file.read()) if file.compression else file.path
    try:
        with parquet.ParquetFile(source) as table:
            yield table
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise file.corrupt("Parquet", describe(str(error))) from error
