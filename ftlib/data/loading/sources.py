"""Any source to located rows: files, data sets, frames, lists."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, final

import numpy as np
from datasets import ClassLabel, Dataset, Features

from ftlib.data.problems import describe
from ftlib.data.reading import Located, Place, read_table
from ftlib.errors import ConfigError, DataError

__all__ = ["Source", "paths_of", "plain_row"]

_PLAIN = frozenset({str, int, float, bool, type(None)})
_TABLES = ("csv", "tsv", "xlsx")  # files whose cells are text, and whose headers people type


@final
@dataclass
class Source:
    """Something that holds rows.

    Args:
        given: a path or several, a data set, a frame, or rows.
        options: of `read_table`, for files.
        notes: what the last pass met, by name: see `Table.notes`.
        is_table: the last pass met a file with a header.
    """

    given: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    is_table: bool = False

    def __iter__(self) -> Iterator[Located]:
        """Every row, the bad ones with their error.

        Raises:
            DataError: a file that cannot be read at all.
            ConfigError: a source of no known kind, or options of files for something else.
        """
        paths = paths_of(self.given)
        if paths:
            for path in paths:
                yield from self._file(path)
            return
        useless = [name for name, value in self.options.items() if value != (name == "header" or None)]
        if useless:
            raise ConfigError(f"load_records: {useless[0]} has no effect on rows in memory. Leave it out.")
        yield from _in_memory(self.given)

    @property
    def name(self) -> str:
        """The source in errors about all of it."""
        paths = paths_of(self.given)
        return str(paths[0]) if paths else f"<{type(self.given).__name__.lower()}>"

    def _file(self, path: Path) -> Iterator[Located]:
        table = read_table(path, **self.options)
        is_table, is_text = table.facts.format in _TABLES, table.facts.format == "txt"
        is_arrow = table.facts.format == "parquet"
        self.is_table = self.is_table or is_table
        for located in table:
            if is_text and not isinstance(located.value, DataError) and not located.value["text"].strip():
                continue  # counted in the notes
            if is_table:
                located = _with_text_cells(located)
            elif is_arrow and isinstance(located.value, dict):
                located = Located(located.place, plain_row(located.value))
            yield located
        self.notes += table.notes


def paths_of(given: Any) -> list[Path]:
    """The files of a source; none where it is no path and no list of paths."""
    if isinstance(given, str | PathLike):
        return [Path(given)]
    if isinstance(given, Sequence) and given and all(isinstance(part, str | PathLike) for part in given):
        return [Path(part) for part in given]
    return []


def plain_row(row: Mapping[Any, Any], features: Features | None = None) -> dict[str, Any]:
    """A row of plain Python values: no numpy, of class labels the names, and inside of columns no null keys,
    which Arrow gives to every object that lacks what another has.
    """
    plain = {str(name): _plain(value) for name, value in row.items()}
    kind = (features or {}).get("label")
    if isinstance(kind, ClassLabel) and isinstance(plain.get("label"), int):
        plain["label"] = kind.int2str(plain["label"]) if plain["label"] >= 0 else None
    return plain


def _in_memory(given: Any) -> Iterator[Located]:
    if isinstance(given, Dataset):
        rows: Iterable[Any] = given.with_format(None)
        name, features = "<dataset>", given.features
    elif (frame := _frame_rows(given)) is not None:
        rows, name, features = frame, "<frame>", None
    elif isinstance(given, Iterable) and not isinstance(given, Mapping | bytes):
        rows, name, features = given, "<list>", None
    else:
        raise ConfigError(
            "load_records: expected a path, a datasets.Dataset, a pandas or polars frame or a list of dicts, "
            f"got {type(given).__name__}."
        )
    for number, row in enumerate(rows, start=1):
        place = Place(name, number)
        if isinstance(row, Mapping):
            yield Located(place, plain_row(row, features))
        else:
            error = place.error(f"expected a dict, got {describe(row)}.", excerpt=describe(row))
            yield Located(place, error, describe(row))


def _frame_rows(given: Any) -> Iterable[Mapping[Any, Any]] | None:
    """The rows of a pandas or polars frame; `None` for something else."""
    pandas, polars = sys.modules.get("pandas"), sys.modules.get("polars")
    if pandas is not None and isinstance(given, pandas.DataFrame):
        rows: Iterable[Mapping[Any, Any]] = given.astype(object).where(given.notna(), None).to_dict("records")
        return rows
    if polars is not None and isinstance(given, polars.DataFrame):
        named: Iterable[Mapping[Any, Any]] = given.iter_rows(named=True)
        return named
    return None


def _plain(value: Any) -> Any:
    if type(value) in _PLAIN:  # most values, and checks against abstract classes are slow
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _with_text_cells(located: Located) -> Located:
    """Names without outer blanks; numbers and truth values of a workbook as the text they show."""
    if isinstance(located.value, DataError):
        return located
    row = {
        name.strip(): value if value is None or isinstance(value, str) else str(value)
        for name, value in located.value.items()
    }
    return Located(located.place, row)
