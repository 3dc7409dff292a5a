"""Rows of two texts on disk, read again as often as needed; memory holds some numbers per row."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from ftlib.data.reading import Place

__all__ = ["Spool"]

_HEAD = struct.Struct("<II")  # bytes of the prompt, bytes of the completion
_BUFFER = 1 << 20


@final
class Spool:
    """An append-only file of (prompt, completion), and what is known of each row.

    Rows are numbered from 0 in the order of the source. Texts must hold no lone surrogates.

    Args:
        folder: where the file goes; it is deleted with the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "rows"
        self._file = self._path.open("wb", buffering=_BUFFER)
        self._numbers = array("q")
        self._starts: list[tuple[int, str, str | None]] = []  # first row of each file and sheet
        self.chars = array("q")  # of both texts
        self.bytes = array("q")  # of both texts, in UTF-8
        # Python's own hashes of the texts: 128 bits for a pair, compared within this process only.
        self.prompt_hashes = array("q")
        self.completion_hashes = array("q")

    def __len__(self) -> int:
        return len(self._numbers)

    def append(self, place: Place, prompt: str, completion: str) -> None:
        """Add one row."""
        if not self._starts or self._starts[-1][1:] != (place.file, place.sheet):
            self._starts.append((len(self._numbers), place.file, place.sheet))
        self._numbers.append(place.row)
        first, second = prompt.encode(), completion.encode()
        self._file.write(_HEAD.pack(len(first), len(second)) + first + second)
        self.chars.append(len(prompt) + len(completion))
        self.bytes.append(len(first) + len(second))
        self.prompt_hashes.append(hash(prompt))
        self.completion_hashes.append(hash(completion))

    def rows(self, kept: NDArray[np.bool_]) -> Iterator[tuple[int, str, str]]:
        """(row, prompt, completion) of the rows for which `kept`, bool [rows], is true."""
        with self._path.open("rb", buffering=_BUFFER) as file:
            read, unpack = file.read, _HEAD.unpack
            for row, wanted in enumerate(kept.tolist()):
                first, second = unpack(read(_HEAD.size))
                data = read(first + second)
                if wanted:
                    yield row, data[:first].decode(), data[first:].decode()

    def read(self, rows: Iterable[int]) -> Iterator[tuple[int, str, str]]:
        """The same for rows in any order."""
        sizes = np.array(self.bytes, dtype=np.int64) + _HEAD.size
        starts = np.cumsum(sizes) - sizes
        with self._path.open("rb") as file:
            for row in rows:
                file.seek(int(starts[row]))
                first, second = _HEAD.unpack(file.read(_HEAD.size))
                data = file.read(first + second)
                yield row, data[:first].decode(), data[first:].decode()

    def place(self, row: int) -> Place:
        """Where a row stands in the source."""
        _, file, sheet = next(start for start in reversed(self._starts) if start[0] <= row)
        return Place(file, self._numbers[row], sheet)

    def label(self, row: int) -> int | str:
        """How reports name a row: by its number; with file or sheet where there are several."""
        if len(self._starts) == 1:
            return self._numbers[row]
        place = self.place(row)
        if len(self.starts()) > 1:
            return f"{Path(place.file).name}:{place.row}"
        return f"{place.sheet}!{place.row}"

    def starts(self) -> list[tuple[int, str]]:
        """First row of each file."""
        found: list[tuple[int, str]] = []
        for start, file, _ in self._starts:
            if not found or found[-1][1] != file:
                found.append((start, file))
        return found

    def close(self) -> None:
        """Write no more."""
        self._file.close()
