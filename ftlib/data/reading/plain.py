"""Plain text: every line is a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ftlib.data.reading.files import SourceFile
from ftlib.data.reading.located import Facts, Located, Opened, Place, ReadOptions
from ftlib.data.reading.text import encoding_of, lines_of, undecoded

__all__ = ["open_plain"]


def open_plain(file: SourceFile, options: ReadOptions) -> Opened:
    """Rows ``{"text": line}``, blank lines among them; nothing follows the final line end."""
    encoding = encoding_of(file, options.encoding)

    def rows(notes: Counter[str]) -> Iterator[Located]:
        for line in lines_of(file, encoding):
            place, text = Place(file.name, line.number), line.text.removesuffix("\n").removesuffix("\r")
            problem = undecoded(file, encoding, line)
            notes["blank_lines"] += not text.strip()
            yield Located(place, {"text": text}) if problem is None else Located(place, problem, text)

    return Opened(Facts(file.name, "txt", "lines", file.compression, encoding), rows)
