"""Files to numbered rows, one reader per extension.

A reader yields `(row number, dict)`; a row that cannot be read yields its `DataError` in place of the
dict, so that all of them are reported together. What makes a whole file unreadable is raised. Row
numbers are physical lines for text, 1-based elements for arrays and tables. Values stay as they are:
CSV cells are text.

A new format is a function with the signature of `Reader` and a row in `READERS`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftlib.data.problems import InputNotFoundError, describe
from ftlib.errors import DataError

__all__ = ["READERS", "Numbered", "Reader", "read"]

Numbered = tuple[int, dict[str, Any] | DataError]
Reader = Callable[[Path], Iterator[Numbered]]

_WRAPPERS = ("data", "examples", "records", "rows", "items")  # keys under which a JSON object keeps its rows
_DELIMITERS = ",;\t|"
_KNOWN_COLUMNS = frozenset({"text", "prompt", "completion", "messages"})
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def read(path: Path) -> Iterator[Numbered]:
    """The rows of one file, by the reader of its extension.

    Raises:
        DataError: ``input_not_found``, ``unsupported_format``, ``file_corrupt``, ``bad_encoding``,
            ``empty_data`` or ``bad_row`` where the whole file is affected.
    """
    if not path.is_file():
        found = "a directory" if path.is_dir() else "nothing there"
        raise InputNotFoundError(
            f"expected a file, found {found}. Check the path.", code="input_not_found", file=str(path)
        )
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"expected one of {', '.join(sorted(READERS))}, got {path.suffix or 'no extension'!r}. "
            "Convert the file, or pass a datasets.Dataset.",
            code="unsupported_format",
            file=str(path),
        )
    if path.stat().st_size == 0:
        raise DataError("expected rows, got an empty file.", code="empty_data", file=str(path))
    return reader(path)


def _read_json_lines(path: Path) -> Iterator[Numbered]:
    r"""One JSON object per line. Only ``\n`` ends a line, so U+2028 may stand inside one."""
    with path.open("rb") as file:
        head = file.read(4)
    if head.lstrip(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        yield from _read_json(path)  # an array under the wrong extension
        return
    if _encoding(head) == "utf-16":
        lines: Iterator[bytes] = iter(_text(path).encode().split(b"\n"))
    else:
        lines = _byte_lines(path)
    offset = 0
    for number, line in enumerate(lines, start=1):
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if content.strip():
            yield number, _json_line(path, number, content, offset + len(line) - len(content))
        offset += len(line)


def _byte_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _json_line(path: Path, number: int, line: bytes, offset: int) -> dict[str, Any] | DataError:
    try:
        return _as_row(path, number, _parse(line.decode().rstrip("\r\n"), path, number))
    except UnicodeDecodeError as error:
        return _bad_encoding(path, number, offset + error.start, line[error.start : error.start + 8])
    except DataError as error:
        return error


def _read_json(path: Path) -> Iterator[Numbered]:
    """An array of objects, one object, an object of columns, a list under a usual key, or JSON lines."""
    text = _text(path)
    try:
        value = _parse(text, path, None)
    except DataError:
        first = next((line for line in text.split("\n") if line.strip()), "")
        if not _is_object(first):
            raise
        yield from _numbered(path, text)
        return
    for number, row in enumerate(_rows_of(value), start=1):
        yield number, _as_row(path, number, row)


def _numbered(path: Path, text: str) -> Iterator[Numbered]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _json_line(path, number, line.encode(), 0)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _rows_of(value: Any) -> Sequence[Any]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    for key in _WRAPPERS:
        if isinstance(value.get(key), list) and all(isinstance(item, dict) for item in value[key]):
            return list(value[key])
    columns = list(value.values())
    is_table = (
        bool(columns) and all(isinstance(column, list) for column in columns) and "messages" not in value
    )
    if is_table and len({len(column) for column in columns}) == 1:
        return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return [value]


def _read_csv(path: Path) -> Iterator[Numbered]:
    """Cells stay text; an empty cell is an empty string, a missing one null."""
    text = _text(path)
    limit = csv.field_size_limit(max(len(text), 1))  # the module's default refuses cells over 128 kB
    try:
        yield from _csv_rows(path, text)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: Path, text: str) -> Iterator[Numbered]:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text), strict=True)
    header: list[str] | None = None
    while True:
        number = lines.line_num + 1
        try:
            cells = next(lines, None)
        except csv.Error as error:
            yield (
                number,
                DataError(
                    f"expected a CSV row, got {error}. Close the quote that opens in this row.",
                    file=str(path),
                    row=number,
                ),
            )
            return
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = [name.strip() for name in cells]
        else:
            yield number, _csv_row(path, number, header, cells)


def _csv_row(path: Path, number: int, header: list[str], cells: list[str]) -> dict[str, Any] | DataError:
    if len(cells) > len(header):
        return DataError(
            f"expected {len(header)} cells, got {len(cells)}. Quote cells that hold the delimiter.",
            file=str(path),
            row=number,
            excerpt=describe(cells[len(header) :]),
        )
    row: dict[str, Any] = dict.fromkeys(header)
    for name, cell in zip(header, cells, strict=False):
        if row[name] is not None and row[name] != cell:
            return DataError(
                f"expected one column {name!r}, got two with different content. Rename one.",
                code="duplicate_column",
                file=str(path),
                row=number,
                column=name,
            )
        row[name] = cell
    return row


def _delimiter(text: str) -> str:
    """The one delimiter under which the header names known columns; otherwise the comma."""
    header = text.lstrip("\n\r").split("\n", 1)[0].strip()
    known = {}
    for delimiter in _DELIMITERS:
        names = next(csv.reader([header], delimiter=delimiter), [])
        known[delimiter] = len(_KNOWN_COLUMNS.intersection(name.strip() for name in names))
    best = max(known.values())
    winners = [delimiter for delimiter, count in known.items() if count == best]
    return winners[0] if best and len(winners) == 1 else ","


def _read_parquet(path: Path) -> Iterator[Numbered]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"expected a Parquet file, got {describe(str(error))} Copy the file again.",
            code="file_corrupt",
            file=str(path),
            byte=path.stat().st_size,
        ) from error


READERS: Mapping[str, Reader] = {
    ".csv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}


def _parse(text: str, path: Path, number: int | None) -> Any:
    """JSON without duplicate keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(
                f"expected each key once, got {twice!r} twice. Remove one.",
                file=str(path),
                row=number,
                column=twice,
            )
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise DataError(
            f"expected JSON, got {error.msg}. Repair the {'file' if number is None else 'line'}.",
            file=str(path),
            row=number or error.lineno,
            column=error.colno,
            excerpt=error.doc[max(0, error.pos - 20) : error.pos + 60],
        ) from error
    except RecursionError as error:
        raise DataError(
            "expected JSON, got lists nested too deeply to read.", file=str(path), row=number
        ) from error


def _as_row(path: Path, number: int, value: Any) -> dict[str, Any] | DataError:
    if isinstance(value, dict):
        return value
    return DataError(
        f"expected an object, got {describe(value)}. Write one {{…}} per row.",
        file=str(path),
        row=number,
        excerpt=describe(value),
    )


def _encoding(head: bytes) -> str:
    return next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")


def _text(path: Path) -> str:
    """The whole file, byte order marks removed."""
    data = path.read_bytes()
    try:
        return data.decode(_encoding(data))
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise _bad_encoding(path, row, error.start, data[error.start : error.start + 8]) from error


def _bad_encoding(path: Path, row: int, byte: int, found: bytes) -> DataError:
    return DataError(
        f"expected UTF-8, got the bytes {found.hex(' ')} at byte {byte}. Save the file as UTF-8.",
        code="bad_encoding",
        file=str(path),
        row=row,
        byte=byte,
        excerpt=found.hex(" "),
    )
