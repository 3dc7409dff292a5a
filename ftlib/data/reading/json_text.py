"""JSON: lines, an array, one object, an object of columns, or a list under a usual key."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from ftlib.data.problems import describe
from ftlib.data.reading.files import SourceFile
from ftlib.data.reading.located import Facts, Located, Opened, Place, ReadOptions
from ftlib.data.reading.text import Line, encoding_of, lines_of, text_of, undecoded
from ftlib.errors import DataError

__all__ = ["is_object", "open_document", "open_lines"]

_WRAPPERS = ("data", "examples", "records", "rows", "items")  # keys under which an object keeps its rows


def open_lines(file: SourceFile, options: ReadOptions) -> Opened:
    """One object per line; a bad line is a bad row."""
    encoding = encoding_of(file, options.encoding)

    def rows(_: Counter[str]) -> Iterator[Located]:
        for line in lines_of(file, encoding):
            if line.text.strip():
                yield _located(file, encoding, line)

    return Opened(Facts(file.name, "jsonl", "lines", file.compression, encoding), rows)


def open_document(file: SourceFile, options: ReadOptions) -> Opened:
    """One JSON value that holds the rows. It is parsed whole, and kept.

    Raises:
        DataError: text that is no JSON; ``empty_data``: no text at all.
    """
    encoding = encoding_of(file, options.encoding)
    text = text_of(file, encoding)
    if not text.strip():
        raise DataError("expected rows, got blanks alone.", code="empty_data", file=file.name)
    start = Place(file.name, 1)
    shape, values = _shaped(_parsed(text, start, Line(1, 0, text)), start)

    def rows(_: Counter[str]) -> Iterator[Located]:
        for number, value in enumerate(values, start=1):
            yield _as_row(Place(file.name, number), value, None)

    return Opened(Facts(file.name, "json", shape, file.compression, encoding), rows)


def is_object(text: str) -> bool:
    """Whether a line is a whole JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _located(file: SourceFile, encoding: str, line: Line) -> Located:
    place, raw = Place(file.name, line.number), line.text.rstrip("\r\n")
    problem = undecoded(file, encoding, line)
    if problem is not None:
        return Located(place, problem, raw)
    try:
        return _as_row(place, _parsed(raw, place, line), raw)
    except DataError as error:
        return Located(place, error, raw)


def _as_row(place: Place, value: Any, raw: str | None) -> Located:
    if isinstance(value, dict):
        return Located(place, value)
    error = place.error(
        f"expected an object, got {describe(value)}. Write one {{…}} per row.", excerpt=describe(value)
    )
    return Located(place, error, raw if raw is not None else json.dumps(value, ensure_ascii=False))


def _shaped(value: Any, start: Place) -> tuple[str, Sequence[Any]]:
    """The shape of a document, and its rows.

    Raises:
        DataError: columns of text that differ in length.
    """
    if isinstance(value, list):
        return "array", value
    if not isinstance(value, dict):
        return "object", [value]
    for key in _WRAPPERS:
        found = value.get(key)
        if found == [] or (isinstance(found, list) and any(isinstance(item, dict) for item in found)):
            return f"list under {key!r}", value[key]
    columns = list(value.values())
    if _are_indexed(columns):
        rows = zip(*(column.values() for column in columns), strict=True)
        return "columns", [dict(zip(value, cells, strict=True)) for cells in rows]
    is_table = all(isinstance(column, list) for column in columns) and not _is_conversation(value)
    if columns and is_table and len({len(column) for column in columns}) == 1:
        return "columns", [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    if columns and is_table and all(isinstance(cell, str) for column in columns for cell in column):
        lengths = {name: len(column) for name, column in value.items()}
        raise start.error(f"expected columns of one length, got {lengths}. Give every row a cell in each.")
    return "object", [value]


def _are_indexed(columns: Sequence[Any]) -> bool:
    """Columns as pandas writes them: each an object from the numbers of the rows to their values."""
    if not columns or not all(isinstance(column, dict) and column for column in columns):
        return False
    numbers = list(columns[0])
    return all(map(str.isdecimal, numbers)) and all(list(column) == numbers for column in columns)


def _is_conversation(value: dict[str, Any]) -> bool:
    """One record whose columns are message lists."""
    return any(
        isinstance(item, dict) and ("role" in item or "from" in item)
        for column in value.values()
        for item in column
    )


def _parsed(text: str, place: Place, line: Line) -> Any:
    """JSON in which no object gives one key two values."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next((key for key, value in pairs if found[key] != value), None)
            if twice is not None:
                raise place.error(
                    f"expected each key once, got {twice!r} twice with different values. Remove one.",
                    code="duplicate_column",
                    column=twice,
                )
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise DataError(
            f"expected JSON, got {error.msg}. Repair line {line.number + error.lineno - 1}.",
            file=place.file,
            row=line.number + error.lineno - 1,
            column=error.colno,
            byte=line.start + len(error.doc[: error.pos].encode(errors="surrogatepass")),
            excerpt=error.doc[max(0, error.pos - 20) : error.pos + 60],
        ) from error
    except DataError:  # a ValueError too
        raise
    except RecursionError as error:
        raise place.error("expected JSON, got lists nested too deeply to read.") from error
    except ValueError as error:  # an integer of thousands of digits
        raise place.error(f"expected JSON, got a value that cannot be read: {error}.") from error
