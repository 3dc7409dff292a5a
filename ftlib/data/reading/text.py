r"""Bytes to lines of text, each with its number and where it starts. Only ``\n`` ends a line.

Bytes that are not in the encoding are kept as lone surrogates (Python's ``surrogateescape``), so that the
rows they stand in are reported like any other bad row.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from ftlib.data.reading.files import SourceFile
from ftlib.errors import ConfigError, DataError

__all__ = ["Line", "encoding_of", "lines_of", "split_lines", "text_of", "undecoded"]

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_ESCAPED = re.compile("[\udc80-\udcff]+")
_LINE = re.compile(r"[^\n]*\n|[^\n]+\Z")
_SHOWN = 8  # bytes quoted from where the encoding breaks


@final
@dataclass(frozen=True, slots=True)
class Line:
    """One physical line: its 1-based number, the byte it starts at, its text with the line end."""

    number: int
    start: int
    text: str


def encoding_of(file: SourceFile, asked: str | None) -> str:
    """The encoding: by byte order mark, as asked, or else UTF-8.

    Raises:
        ConfigError: an encoding that Python does not know.
    """
    if asked is not None:
        try:
            codecs.lookup(asked)
        except LookupError as error:
            raise ConfigError(f"expected a text encoding such as 'latin-1', got {asked!r}.") from error
    head = file.head(4)
    return next((name for mark, name in _MARKS if head.startswith(mark)), asked or "utf-8")


def lines_of(file: SourceFile, encoding: str) -> Iterator[Line]:
    """All lines, in order, without the byte order mark.

    Raises:
        DataError: ``bad_encoding`` in an encoding of several bytes a character, which has to be read whole.
    """
    start = _mark(file)
    if not _one_byte_line_ends(encoding):
        for number, text in enumerate(split_lines(text_of(file, encoding)), start=1):
            yield Line(number, start, text)
            start += len(text.encode(encoding))
        return
    with file.open() as opened:
        opened.read(start)
        for number, line in enumerate(opened, start=1):
            yield Line(number, start, line.decode(encoding, "surrogateescape"))
            start += len(line)


def split_lines(text: str) -> Iterator[str]:
    r"""The lines of a text with their ends; `str.splitlines` would also break at U+2028 and its like.

    Example:
        >>> list(split_lines("a\u2028b\n\nc"))
        ['a\u2028b\n', '\n', 'c']
    """
    yield from (line[0] for line in _LINE.finditer(text))


def text_of(file: SourceFile, encoding: str) -> str:
    """The whole file, without the byte order mark.

    Raises:
        DataError: ``bad_encoding``.
    """
    data = file.read()[_mark(file) :]
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        row = data[: error.start].decode(encoding).count("\n") + 1
        at = _mark(file) + error.start
        raise _bad_encoding(file, encoding, row, at, data[error.start : error.start + _SHOWN]) from error


def undecoded(file: SourceFile, encoding: str, line: Line) -> DataError | None:
    """The error of a line whose bytes are not in the encoding; `None` for a good one."""
    found = None if line.text.isascii() else _ESCAPED.search(line.text)
    if found is None:
        return None
    data = line.text.encode(encoding, "surrogateescape")
    at = len(line.text[: found.start()].encode(encoding, "surrogateescape"))
    return _bad_encoding(file, encoding, line.number, line.start + at, data[at : at + _SHOWN])


def _mark(file: SourceFile) -> int:
    """Length of the byte order mark."""
    head = file.head(4)
    return next((len(mark) for mark, _ in _MARKS if head.startswith(mark)), 0)


def _one_byte_line_ends(encoding: str) -> bool:
    return "\n".encode(encoding) == b"\n" and not encoding.lower().startswith(("utf-16", "utf-32"))


def _bad_encoding(file: SourceFile, encoding: str, row: int, byte: int, found: bytes) -> DataError:
    return DataError(
        f"expected {encoding.upper()}, got the bytes {found.hex(' ')} at byte {byte}. Save the file as "
        'UTF-8, or name its encoding: encoding="latin-1".',
        code="bad_encoding",
        file=file.name,
        row=row,
        byte=byte,
        excerpt=found.hex(" "),
    )
