"""Excel workbooks (.xlsx): a header row and rows of typed cells. Formulas give their stored results."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, time
from typing import Any

from ftlib.data.problems import describe
from ftlib.data.reading.delimited import header_names, merged
from ftlib.data.reading.files import SourceFile
from ftlib.data.reading.located import Facts, Located, Opened, Place, ReadOptions
from ftlib.errors import ConfigError, DataError, MissingPackageError

__all__ = ["open_workbook"]

Numbered = tuple[int, list[Any]]  # sheet row, and its cells without the empty ones at the end


def open_workbook(file: SourceFile, options: ReadOptions) -> Opened:
    """One sheet, or with ``sheet="all"`` every sheet that holds rows, one after the other.

    Raises:
        DataError: ``file_corrupt``; ``ambiguous_input``: several sheets hold rows and none is named;
            ``empty_data``: none does.
        ConfigError: a sheet that is not there.
        MissingPackageError: openpyxl is not installed.
    """
    with _workbook(file) as book:
        counts = {sheet.title: sum(1 for _ in _cells(sheet)) - options.header for sheet in book.worksheets}
    filled = {title: count for title, count in counts.items() if count > 0}
    chosen = _chosen(file, filled, options)
    header = _first_row(file, chosen[0], named=options.header)

    def rows(_: Counter[str]) -> Iterator[Located]:
        with _workbook(file) as book:
            for title in chosen:
                yield from _sheet_rows(file, book[title], title, named=options.header)

    facts = Facts(
        file.name,
        "xlsx",
        "table",
        file.compression,
        header=tuple(header) if options.header else None,
        sheet=chosen[0] if len(chosen) == 1 else "all",
    )
    return Opened(facts, rows)


def _chosen(file: SourceFile, filled: dict[str, int], options: ReadOptions) -> list[str]:
    """The sheets to read."""
    told = ", ".join(f"{title!r} ({count} rows)" for title, count in filled.items())
    if not filled:
        raise DataError("expected rows, got sheets without any.", code="empty_data", file=file.name)
    if options.sheet is None:
        if len(filled) > 1:
            raise DataError(
                f"expected one sheet with rows, got {told}. Name it: sheet={next(iter(filled))!r}, or "
                'read all of them: sheet="all".',
                code="ambiguous_input",
                file=file.name,
            )
        return list(filled)
    if options.sheet == "all":
        return list(filled)
    if options.sheet not in filled:
        raise ConfigError(f"{file.name}: expected sheet as one of {told}, got {options.sheet!r}.")
    return [options.sheet]


def _first_row(file: SourceFile, title: str, *, named: bool) -> list[str]:
    with _workbook(file) as book:
        return _names(next(_cells(book[title]))[1], named=named)


def _names(cells: list[Any], *, named: bool) -> list[str]:
    if named:
        return header_names([None if cell is None else str(cell) for cell in cells])
    return ["prompt", "completion"] if len(cells) == 2 else [f"column_{k + 1}" for k in range(len(cells))]


def _sheet_rows(file: SourceFile, sheet: Any, title: str, *, named: bool) -> Iterator[Located]:
    cells = _cells(sheet)
    number, first = next(cells)
    names = _names(first, named=named)
    if not named:
        yield _row(Place(file.name, number, title), names, first)
    for number, row in cells:
        yield _row(Place(file.name, number, title), names, row)


def _row(place: Place, names: list[str], cells: list[Any]) -> Located:
    if len(cells) > len(names):
        error = place.error(
            f"expected {len(names)} cells, got {len(cells)}. Name the column in the header, or empty it.",
            excerpt=describe(cells[len(names) :]),
        )
        return Located(place, error, repr(cells))
    return Located(place, merged(place, names, cells))


def _cells(sheet: Any) -> Iterator[Numbered]:
    """The rows that hold anything."""
    sheet.reset_dimensions()  # what a file says of its own size may be too small, and cut it
    for number, row in enumerate(sheet.iter_rows(values_only=True), start=1):
        cells = [value.isoformat() if isinstance(value, date | time) else value for value in row]
        while cells and cells[-1] is None:
            cells.pop()
        if cells:
            yield number, cells


@contextmanager
def _workbook(file: SourceFile) -> Iterator[Any]:
    try:
        import openpyxl
    except ImportError as error:
        raise MissingPackageError(
            "expected the package openpyxl for .xlsx files, found none. pip install 'ftlib[excel]'."
        ) from error
    with io.BytesIO(file.read()) if file.compression else file.path.open("rb") as opened:
        try:
            book = openpyxl.load_workbook(opened, read_only=True, data_only=True)
        except (zipfile.BadZipFile, KeyError, ValueError, OSError, SyntaxError) as error:
            raise file.corrupt("workbook (.xlsx)", describe(str(error))) from error
        try:
            yield book
        except (zipfile.BadZipFile, SyntaxError, EOFError) as error:  # SyntaxError: of the XML inside
            raise file.corrupt("workbook (.xlsx)", describe(str(error))) from error
        finally:
            book.close()
