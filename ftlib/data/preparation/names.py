"""Names of the files that are written: never one that is taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import final

__all__ = ["Names", "names_for", "stem_of"]

_COMPRESSED = (".gz", ".zst")


@final
@dataclass(frozen=True)
class Names:
    """Where things go.

    Args:
        data: of each part in order; or of training and validation rows.
        report: of the report.
        rows: of the rows and changes that the report only counts.
        rejected: of rows that could not be read.
    """

    data: tuple[Path, ...]
    report: Path
    rows: Path
    rejected: Path

    @property
    def all(self) -> tuple[Path, ...]:
        """All of them."""
        return (*self.data, self.report, self.rows, self.rejected)


def stem_of(file: str) -> str:
    """The name of a file without what says its format.

    Example:
        >>> stem_of("data/faq.v2.csv.gz"), stem_of("<list>")
        ('faq.v2', 'list')
    """
    path = Path(file.strip("<>"))
    if path.suffix.lower() in _COMPRESSED:
        path = path.with_suffix("")
    return path.stem


def names_for(stems: Sequence[tuple[Path, str]], *, split: bool) -> Names:
    """The first names of which none is taken: as they are, then with ` (1)`, ` (2)`, ...

    Args:
        stems: folder and stem of each part.
        split: one part gives two files.
    """
    for number in count():
        names = _names(stems, f" ({number})" if number else "", split=split)
        if not any(path.exists() or path.is_symlink() for path in names.all):
            return names
    raise AssertionError("unreachable")


def _names(stems: Sequence[tuple[Path, str]], suffix: str, *, split: bool) -> Names:
    sides = ("_train", "_valid") if split else ("",)
    folder, stem = stems[0]
    data = tuple(place / f"{name}_prepared{side}{suffix}.jsonl" for place, name in stems for side in sides)
    return Names(
        data,
        folder / f"{stem}_prepared{suffix}.report.json",
        folder / f"{stem}_prepared{suffix}.rows.report.json",
        folder / f"{stem}_rejected{suffix}.jsonl",
    )
