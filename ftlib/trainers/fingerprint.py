"""The content of encoded data as one hash: the same for the same rows in the same order, however held.

    of each column:  the lengths of its lists, level by level, then its numbers; SHA-256 of each stream
    of the data:     SHA-256 over the names and hashes of all streams

Data sets are read as Arrow buffers, thousands of rows at a time: no row is made in Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from torch import Tensor

__all__ = ["data_fingerprint", "streams"]

_ROWS = 4096  # read at a time
_NESTED = ("continuation_ids", "continuation_weights")  # a list per continuation; elsewhere numbers
_IDS = ("prefix_ids", "continuation_ids")

Streams = dict[str, list[npt.NDArray[Any]]]  # column -> lengths of each level, numbers


def data_fingerprint(data: Dataset | Sequence[Mapping[str, Any]]) -> str:
    """SHA-256, in hexadecimal, over the columns that training reads: ids, weights and extras.

    Where a row came from (``source``) does not count, nor do the types that hold its numbers.

    Args:
        data: encoded examples, at least one.
    """
    hashes: dict[str, Any] = {}
    for some in streams(data):
        for name, parts in some.items():
            for level, part in enumerate(parts):
                hashes.setdefault(f"{name}/{level}", hashlib.sha256()).update(part.tobytes())
    whole = hashlib.sha256()
    for stream, digest in sorted(hashes.items()):
        whole.update(stream.encode() + digest.digest())
    return whole.hexdigest()


def streams(data: Dataset | Sequence[Mapping[str, Any]]) -> Iterator[Streams]:
    """The columns that training reads, thousands of rows at a time.

    Yields:
        column -> the lengths of its lists, int64, level by level, and its numbers, int32 or float32.
    """
    # rows that a transform makes are not those that lie in the buffers
    in_arrow = isinstance(data, Dataset) and data.format["type"] != "custom"
    return _of_arrow(data) if in_arrow else _of_rows(data)


def _of_arrow(data: Any) -> Iterator[Streams]:
    names = _columns(data.with_format(None)[0])
    for table in data.select_columns(names).with_format("arrow").iter(_ROWS):
        some: Streams = {}
        for name in names:
            values, parts = table[name], []
            while not pa.types.is_primitive(values.type):
                parts.append(pc.list_value_length(values).to_numpy().astype(np.int64))
                values = pc.list_flatten(values)
            some[name] = [*parts, values.to_numpy().astype(_dtype(name))]
        yield some


def _of_rows(data: Sequence[Mapping[str, Any]]) -> Iterator[Streams]:
    names = _columns(data[0])
    for start in range(0, len(data), _ROWS):
        rows = [data[index] for index in range(start, min(start + _ROWS, len(data)))]
        some: Streams = {}
        for name in names:
            values, parts = [row[name] for row in rows], []
            for _ in range(2 if name in _NESTED else 1):
                parts.append(np.asarray([len(value) for value in values], np.int64))
                values = list(chain.from_iterable(values))
            some[name] = [*parts, np.asarray(values, _dtype(name))]
        yield some


def _columns(row: Mapping[str, Any]) -> list[str]:
    """Those that a batch is made of: all that hold lists of numbers. See `ftlib.data.collate`.

    The messages of a prompt, which rows of prompts carry for the reward, are in its ids.
    """
    lists = {name: value for name, value in row.items() if isinstance(value, (list, tuple, Tensor))}
    return [
        name for name, value in lists.items() if not any(isinstance(item, Mapping | str) for item in value)
    ]


def _dtype(name: str) -> type[np.generic]:
    return np.int32 if name in _IDS else np.float32
