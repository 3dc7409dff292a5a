"""Any file to located rows. The content decides the format; the extension breaks ties.

A new format is a function that gives an `Opened`, and a row in `OPENERS`; if its content can be told from
others, also a line in `format_of`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import final

from ftlib.data.reading.delimited import DELIMITERS, names_columns, open_delimited
from ftlib.data.reading.files import SourceFile, source_file
from ftlib.data.reading.json_text import is_object, open_document, open_lines
from ftlib.data.reading.located import Facts, Located, Opened, ReadOptions
from ftlib.data.reading.parquet import open_parquet
from ftlib.data.reading.plain import open_plain
from ftlib.data.reading.text import encoding_of, lines_of
from ftlib.data.reading.workbook import open_workbook
from ftlib.errors import ConfigError, DataError

__all__ = ["OPENERS", "Table", "format_of", "read_table"]

Opener = Callable[[SourceFile, ReadOptions], Opened]

OPENERS: Mapping[str, Opener] = {
    "csv": open_delimited,
    "tsv": open_delimited,
    "txt": open_plain,
    "json": open_document,
    "jsonl": open_lines,
    "xlsx": open_workbook,
    "parquet": open_parquet,
}
_USED_BY = {  # option -> formats
    "encoding": ("csv", "tsv", "txt", "json", "jsonl"),
    "delimiter": ("csv", "tsv"),
    "header": ("csv", "tsv", "xlsx"),
    "sheet": ("xlsx",),
}
_MAGIC = {b"PK\x03\x04": "xlsx", b"PAR1": "parquet"}
_ARRAY_OF_OBJECTS = re.compile(r"\[\s*(\{|\Z)")


@final
class Table:
    """A file that can be read again and again, each time from its start.

    Iterating gives every row, the bad ones with their error. `facts` tell how it is read, `notes` count
    what the last pass met: ``blank_lines`` (of plain text), ``stray_quotes`` (of TSV), ``short_rows``.
    """

    def __init__(self, opened: Opened) -> None:
        self.facts: Facts = opened.facts
        self.notes: Counter[str] = Counter()
        self._opened = opened

    def __iter__(self) -> Iterator[Located]:
        self.notes = Counter()
        return self._opened.rows(self.notes)


def read_table(
    path: str | PathLike[str],
    *,
    encoding: str | None = None,
    delimiter: str | None = None,
    header: bool = True,
    sheet: str | None = None,
) -> Table:
    """A file as located rows, read as a stream (JSON documents and compressed binary files whole).

    Args:
        path: `.csv`, `.tsv`, `.txt`, `.json`, `.jsonl`, `.xlsx` or `.parquet` in any case, perhaps with
            `.gz` or `.zst`.
        encoding: of text without a byte order mark; UTF-8 unless told.
        delimiter: of CSV and TSV; found by the header unless told.
        header: whether the first row of a table names the columns. Without, two columns are `prompt` and
            `completion`, others `column_1`, `column_2`, ...
        sheet: of a workbook with several, its name or ``"all"``.

    Raises:
        DataError: ``input_not_found``, ``unsupported_format``, ``file_corrupt``, ``bad_encoding``,
            ``ambiguous_input``, ``duplicate_column``, ``empty_data`` or ``bad_row`` where the whole file
            cannot be read; some of them only while it is read. Rows that cannot be read are no exception:
            they are given as their error.
        ConfigError: an option that this file has no use for, or a bad one.
        MissingPackageError: an extra that is not installed.
    """
    file = source_file(Path(path))
    options = ReadOptions(encoding, delimiter, header, sheet)
    name = format_of(file, options)
    _check_use(name, options)
    return Table(OPENERS[name](file, options))


def _check_use(name: str, options: ReadOptions) -> None:
    """Refuse options that say nothing about a file of this format."""
    given = {
        "encoding": options.encoding is not None,
        "delimiter": options.delimiter is not None,
        "header": not options.header,
        "sheet": options.sheet is not None,
    }
    useless = [option for option, there in given.items() if there and name not in _USED_BY[option]]
    if useless:
        raise ConfigError(f"{useless[0]} has no effect on a file of format {name}. Leave it out.")


def format_of(file: SourceFile, options: ReadOptions) -> str:
    """The format of a file: by its first bytes, then by its first line, then by its extension.

    Raises:
        DataError: ``file_corrupt``: a binary extension on other content; ``empty_data``.
    """
    head = file.head(4)
    if not head:
        raise DataError("expected rows, got an empty file.", code="empty_data", file=file.name)
    for mark, name in _MAGIC.items():
        if head.startswith(mark):
            return name
    if file.extension in ("xlsx", "parquet"):
        raise file.corrupt(f".{file.extension}", f"the bytes {head.hex(' ')} at its start")
    lines = (line.text for line in lines_of(file, encoding_of(file, options.encoding)) if line.text.strip())
    first = next(lines, "").strip()
    if file.extension == "txt":
        return "jsonl" if is_object(first) and all(map(is_object, lines)) else "txt"
    another = next(lines, None) is not None
    if file.extension in ("csv", "tsv"):
        if is_object(first):
            return "jsonl"
        return "json" if _ARRAY_OF_OBJECTS.match(first) else file.extension
    return _json_format(file.extension, first, another=another)


def _json_format(extension: str, first: str, *, another: bool) -> str:
    """Lines or one document, of a file that ends in `.json` or `.jsonl`."""
    if not first.startswith(("{", "[")) and max(names_columns(first, d) for d in DELIMITERS) > 1:
        return "csv"  # a table under the wrong extension
    if is_object(first):
        return "jsonl" if another or extension == "jsonl" else "json"
    if extension == "json":
        return "json"
    return "json" if first == "{" or _ARRAY_OF_OBJECTS.match(first) else "jsonl"
