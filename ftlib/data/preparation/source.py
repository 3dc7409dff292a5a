"""Any source as located rows that can be read once: files, data sets, frames and lists."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, final

from ftlib.data.loading.sources import Source
from ftlib.data.preparation.settings import Settings
from ftlib.data.reading import Facts, Located, Table, place_of, read_table
from ftlib.errors import ConfigError, DataError

__all__ = ["Part", "parts_of"]

_CHUNK = 1 << 20


@final
@dataclass(frozen=True)
class Part:
    """One file, or the rows of one object in memory.

    Args:
        facts: what it is.
        rows: its rows, anew at each iteration.
        path: of a file.
    """

    facts: Facts
    rows: Iterable[Located]
    path: Path | None = None

    @property
    def notes(self) -> Counter[str]:
        """What the last pass over the rows met."""
        return self.rows.notes if isinstance(self.rows, Table) else Counter()

    def sha256(self) -> str:
        """Of the file's bytes; of objects in memory, of their rows as JSON."""
        digest = hashlib.sha256()
        if self.path is None:
            for located in self.rows:
                digest.update(json.dumps(located.value, ensure_ascii=True, default=str).encode() + b"\n")
            return digest.hexdigest()
        with self.path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()


def parts_of(source: Any, settings: Settings) -> tuple[Part, ...]:
    """The files of `source`, or the one object in memory.

    Raises:
        DataError: a file that cannot be read.
        ConfigError: no known kind of source, or options that it has no use for.
    """
    if isinstance(source, (str, PathLike)):
        return (_file(Path(source), settings),)
    if isinstance(source, Sequence) and source and all(isinstance(each, (str, PathLike)) for each in source):
        return tuple(_file(Path(each), settings) for each in source)
    given = {
        "encoding": settings.encoding,
        "delimiter": settings.delimiter,
        "header": None if settings.header else False,
        "sheet": settings.sheet,
    }
    useless = [name for name, value in given.items() if value is not None]
    if useless:
        raise ConfigError(f"prepare: {useless[0]} has no effect on data in memory. Leave it out.")
    rows = _Rows(Source(source))
    return (Part(Facts(rows.name, rows.name.strip("<>"), "rows"), rows),)


def _file(path: Path, settings: Settings) -> Part:
    table = read_table(
        path,
        encoding=settings.encoding,
        delimiter=settings.delimiter,
        header=settings.header,
        sheet=settings.sheet,
    )
    return Part(table.facts, table, path)


@final
class _Rows:
    """Rows in memory; `_source` of a row names its place."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.name = source.name

    def __iter__(self) -> Iterator[Located]:
        for located in self._source:
            if isinstance(located.value, DataError) or "_source" not in located.value:
                yield located
                continue
            given = located.value["_source"]
            value = {name: cell for name, cell in located.value.items() if name != "_source"}
            yield Located((place_of(given) if isinstance(given, str) else None) or located.place, value)
