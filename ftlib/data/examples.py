"""One encoded example, and what became of it on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from ftlib.data.overflow import Weighted
from ftlib.data.reading import place_of
from ftlib.errors import DataError

__all__ = ["Example", "refused"]


@final
@dataclass(frozen=True)
class Example:
    """One encoded example and what became of it.

    Args:
        prefix: ids and weights of the prefix.
        continuations: ids and weights of each continuation.
        source: where the row came from, ``file:row``.
        extras: name -> one number per continuation.
        trained: tokens of weight > 0 that have a token before them.
        pairs: pairs of continuations of which one is better.
        notes: names of counters of the report.
        first: the first example of its row.
        dropped: why it is left out, or `None`.
        problem: why the row is refused, or `None`; a refused row has no tokens.
    """

    prefix: Weighted
    continuations: tuple[Weighted, ...]
    source: str
    extras: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    trained: int = 0
    pairs: int = 0
    notes: tuple[str, ...] = ()
    first: bool = True
    dropped: str | None = None
    problem: DataError | None = None

    @property
    def length(self) -> int:
        """Tokens of the example, the prefix counted once."""
        return len(self.prefix[0]) + sum(len(ids) for ids, _ in self.continuations)


def refused(source: str, error: DataError, *, first: bool = True) -> Example:
    """The example of a row that cannot be used: its problem, located at `source`."""
    place = place_of(source)
    located = error.replaced(
        file=source if place is None else place.file,
        row=None if place is None else place.row,
        sheet=None if place is None else place.sheet,
    )
    return Example(([], []), (), source, first=first, problem=located)
