"""A row of a file and the place it stands at."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

from ftlib.errors import DataError

__all__ = ["Facts", "Located", "Opened", "Place", "ReadOptions", "place_of"]

Notes = Counter[str]


@final
@dataclass(frozen=True)
class Place:
    """Where a row stands; prints as ``file:row`` or ``file:sheet!row``.

    Args:
        file: path as given, or ``<list>`` and the like.
        row: physical line where the row starts (a header is line 1), sheet row, or 1-based element.
        sheet: sheet of a workbook.
    """

    file: str
    row: int
    sheet: str | None = None

    def __str__(self) -> str:
        return f"{self.file}:{self.row}" if self.sheet is None else f"{self.file}:{self.sheet}!{self.row}"

    def error(self, message: str, **fields: Any) -> DataError:
        """A `DataError` about this row."""
        return DataError(message, file=self.file, row=self.row, sheet=self.sheet, **fields)


@final
@dataclass(frozen=True)
class Located:
    """One row, or why it cannot be read.

    Args:
        place: where it stands.
        value: the row, its values as the file types them (CSV cells are text); or its error.
        raw: of a row that cannot be read its text as it stands in the file; otherwise `None`.
    """

    place: Place
    value: dict[str, Any] | DataError
    raw: str | None = None


@final
@dataclass(frozen=True)
class Facts:
    """What a file turned out to be.

    Args:
        file: path as given.
        format: ``csv``, ``tsv``, ``txt``, ``json``, ``jsonl``, ``xlsx`` or ``parquet``, by content.
        shape: ``table``, ``lines``; of JSON ``lines``, ``array``, ``object``, ``columns`` or ``list
            under 'data'``.
        compression: ``gz``, ``zst`` or `None`.
        encoding: of text, as Python names it; a byte order mark decides.
        delimiter: of CSV and TSV.
        header: column names as they stand in the header, not trimmed; `None` without a header.
        sheet: sheet of a workbook, or ``all``.
    """

    file: str
    format: str
    shape: str
    compression: str | None = None
    encoding: str | None = None
    delimiter: str | None = None
    header: tuple[str, ...] | None = None
    sheet: str | None = None


@final
@dataclass(frozen=True)
class ReadOptions:
    """What the user said about a file; `None` leaves it to the content. See `read_table`."""

    encoding: str | None = None
    delimiter: str | None = None
    header: bool = True
    sheet: str | None = None


@final
@dataclass(frozen=True)
class Opened:
    """A file that was looked at: its facts, and a function that reads it from the start.

    The function is given a counter for what is worth a note: ``blank_lines``, ``stray_quotes``,
    ``short_rows``.
    """

    facts: Facts
    rows: Callable[[Notes], Iterator[Located]]


_SOURCE = re.compile(r"(?P<file>.*):(?:(?P<sheet>[^:]*)!)?(?P<row>\d+)\Z", re.DOTALL)


def place_of(source: str) -> Place | None:
    """The place that `_source` names; `None` for other text.

    Example:
        >>> place_of("book.xlsx:First!14")
        Place(file='book.xlsx', row=14, sheet='First')
    """
    found = _SOURCE.match(source)
    return None if found is None else Place(found["file"], int(found["row"]), found["sheet"])
