r"""CSV and TSV: a header, then one row per record. Cells stay text.

A CSV cell may span lines inside quotes. TSV quotes never span lines, and those that do not enclose a whole
cell are literal. An empty cell is an empty string, a cell that is missing at the end of a row null.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from ftlib.data.problems import describe
from ftlib.data.reading.files import SourceFile
from ftlib.data.reading.located import Facts, Located, Opened, Place, ReadOptions
from ftlib.data.reading.text import Line, encoding_of, lines_of, undecoded
from ftlib.errors import ConfigError, DataError

__all__ = ["header_names", "merged", "names_columns", "open_delimited"]

DELIMITERS = ",;\t|"
_LONGEST = 2**31 - 1  # characters of a cell; more than that is no C long everywhere
_USUAL = {"csv": ",", "tsv": "\t"}
_KNOWN = frozenset({"text", "prompt", "completion", "messages"})
_TSV_CELL = re.compile(r'"((?:[^"]|"")*)"(?=\t|\Z)|([^\t]*)')

Cells = tuple[list[Line], list[str] | DataError]  # the lines of a record, and its cells


def open_delimited(file: SourceFile, options: ReadOptions) -> Opened:
    """A table of text.

    Raises:
        DataError: a header that cannot be read.
        ConfigError: a delimiter of more than one character.
    """
    encoding = encoding_of(file, options.encoding)
    if options.delimiter is not None and len(options.delimiter) != 1:
        raise ConfigError(f"expected a delimiter of one character, got {options.delimiter!r}.")
    delimiter = options.delimiter or guess_delimiter(file, encoding)

    def records(notes: Counter[str]) -> Iterator[Cells]:
        lines = lines_of(file, encoding)
        return _tsv(lines, notes) if delimiter == "\t" else _csv(lines, delimiter)

    header = _header(file, encoding, records(Counter()), named=options.header)

    def rows(notes: Counter[str]) -> Iterator[Located]:
        names = header_names(header)
        wait = options.header
        for lines, cells in records(notes):
            if wait:  # the header itself
                wait = False
                continue
            place = Place(file.name, lines[0].number)
            raw = "".join(line.text for line in lines).rstrip("\r\n")
            problem = next(filter(None, (undecoded(file, encoding, line) for line in lines)), None)
            if problem is None and isinstance(cells, DataError):
                problem = place.error(cells.message)
            if isinstance(cells, DataError) or problem is not None:
                yield Located(place, problem or place.error("expected a row."), raw)
                continue
            yield _row(place, names, cells, raw, notes)

    facts = Facts(
        file.name,
        "tsv" if delimiter == "\t" else "csv",
        "table",
        file.compression,
        encoding,
        delimiter,
        tuple(header) if options.header else None,
    )
    return Opened(facts, rows)


def guess_delimiter(file: SourceFile, encoding: str) -> str:
    """The one delimiter under which the header names known columns; otherwise that of the extension."""
    usual = _USUAL.get(file.extension, ",")
    header = next((line.text for line in lines_of(file, encoding) if line.text.strip()), "")
    named = {delimiter: names_columns(header, delimiter) for delimiter in DELIMITERS}
    best = max(named.values())
    winners = [delimiter for delimiter, count in named.items() if count == best]
    return winners[0] if best and len(winners) == 1 else usual


def names_columns(header: str, delimiter: str) -> int:
    """How many usual column names a header line has under this delimiter."""
    return len(_KNOWN.intersection(cell.strip(' \t\r\n"').lower() for cell in header.split(delimiter)))


def header_names(header: Sequence[str | None]) -> list[str]:
    """Keys of the rows: the header, and `Unnamed: k` (k from 0) where it names nothing, as pandas has it.

    Example:
        >>> header_names(["", "text"])
        ['Unnamed: 0', 'text']
    """
    return [name if name and name.strip() else f"Unnamed: {k}" for k, name in enumerate(header)]


def merged(place: Place, names: Sequence[str], cells: Sequence[Any]) -> dict[str, Any]:
    """The row of some cells; those that are missing at its end are null.

    Raises:
        DataError: ``duplicate_column``: two columns of one name that differ here.
    """
    row: dict[str, Any] = dict.fromkeys(names)
    for k, (name, cell) in enumerate(zip(names, cells, strict=False)):
        first = names.index(name)
        if first != k and cells[first] != cell:
            raise DataError(
                f"expected one column {name!r}, got two that differ in row {place.row}, at the positions "
                f"{first + 1} and {k + 1}. Rename or remove one.",
                code="duplicate_column",
                file=place.file,
                sheet=place.sheet,
                row=1 if place.sheet is None else None,
                column=name,
                excerpt=describe([cells[first], cell]),
            )
        row[name] = cell
    return row


def _row(place: Place, names: list[str], cells: list[str], raw: str, notes: Counter[str]) -> Located:
    if len(cells) > len(names):
        error = place.error(
            f"expected {len(names)} cells, got {len(cells)}. Quote cells that hold the delimiter.",
            excerpt=describe(cells[len(names) :]),
        )
        return Located(place, error, raw)
    if len(cells) < len(names):
        notes["short_rows"] += 1
    return Located(place, merged(place, names, cells))


def _header(file: SourceFile, encoding: str, records: Iterator[Cells], *, named: bool) -> list[str]:
    """The names of the columns."""
    lines, cells = next(records, ([], []))
    if isinstance(cells, DataError):
        raise cells.replaced(file=file.name, row=lines[0].number)
    for line in lines:
        problem = undecoded(file, encoding, line)
        if problem is not None and named:
            raise problem
    if named:
        return cells
    return ["prompt", "completion"] if len(cells) == 2 else [f"column_{k + 1}" for k in range(len(cells))]


# --- lines to cells ---


@final
@dataclass
class _Taken:
    """Lines as the csv module wants them, remembering those of the present record."""

    lines: Iterator[Line]
    record: list[Line] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.record.append(line)
            yield line.text


def _csv(lines: Iterator[Line], delimiter: str) -> Iterator[Cells]:
    taken = _Taken(lines)
    reader = csv.reader(iter(taken), delimiter=delimiter, strict=True)
    while True:
        taken.record = []
        cells: list[str] | DataError | None
        try:
            cells = _unlimited(lambda: next(reader, None))
        except csv.Error as error:
            cells = DataError(f"expected a CSV row, got {_fault(error, taken.record)}")
        if cells is None:
            return
        if taken.record and cells:  # a blank line has no cells
            yield taken.record, cells


def _fault(error: csv.Error, lines: list[Line]) -> str:
    """What is wrong with a record, and what to do."""
    if "\r" in lines[-1].text.rstrip("\r\n") and "new-line" in str(error):
        return "lines that end in a carriage return alone. Save the file with line feeds as line ends."
    return f"{error}. Close the quote that opens in this row, and double quotes inside one."


def _unlimited(read: Callable[[], list[str] | None]) -> list[str] | None:
    """`read` without the csv module's limit of 128 kB a cell, which is global and put back."""
    limit = csv.field_size_limit(_LONGEST)
    try:
        return read()
    finally:
        csv.field_size_limit(limit)


def _tsv(lines: Iterator[Line], notes: Counter[str]) -> Iterator[Cells]:
    for line in lines:
        text = line.text.rstrip("\r\n")
        if not text:
            continue
        cells, at = [], 0
        while True:
            found = _TSV_CELL.match(text, at)
            assert found is not None  # the second form matches anything  # noqa: S101
            quoted, plain = found.groups()
            if quoted is None and '"' in plain:
                notes["stray_quotes"] += 1
            cells.append(plain if quoted is None else quoted.replace('""', '"'))
            at = found.end() + 1
            if found.end() == len(text):
                break
        yield [line], cells
