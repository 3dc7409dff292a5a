"""Which keys each query row of a packed batch may see, as plain integers.

A group lies flat as its prefix followed by its continuations. The prefix attends to itself
causally; a continuation attends to the prefix and, causally, to itself. Both are one case: a run of
query rows at sequence positions ``[start, stop)`` whose keys are the prefix rows and then its own.

Shapes: T all tokens of a packed batch, n query rows of a tile, m keys of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

from ftlib.batches import Span

__all__ = ["GroupLayout", "Tile", "causal_mask"]


@final
@dataclass(frozen=True)
class Tile:
    """A block of query rows and the rows of the keys they see, all indices into T.

    Args:
        queries: slice of n rows.
        keys: one or two slices of m rows in all, in order of sequence position (prefix, then own).
        offset: position of the first query minus position of the first key, >= 0.
    """

    queries: slice
    keys: tuple[slice, ...]
    offset: int

    @property
    def rows(self) -> int:
        """n, the number of query rows."""
        return int(self.queries.stop - self.queries.start)

    @property
    def columns(self) -> int:
        """m, the number of keys."""
        return sum(int(part.stop - part.start) for part in self.keys)


class GroupLayout:
    """The groups of one packed batch, cut into tiles for attention.

    It travels through the model as the forward keyword ``groups``.
    """

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = tuple(spans)
        self._tiles: dict[tuple[int | None, int | None], tuple[Tile, ...]] = {}

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows that attention layers have asked for so far; None is full attention."""
        return {window for window, _ in self._tiles}

    def tiles(self, *, window: int | None = None, block: int | None = None) -> tuple[Tile, ...]:
        """Tiles that cover every query row once.

        Args:
            window: sliding window in tokens, the query's own included; None sees everything.
            block: most query rows of a tile; None keeps each prefix and continuation whole.
        """
        key = (window, block)
        if key not in self._tiles:
            self._tiles[key] = tuple(self._cut(window, block))
        return self._tiles[key]

    def _cut(self, window: int | None, block: int | None) -> list[Tile]:
        tiles = []
        for span in self.spans:
            row = span.start + span.prefix
            if len(span.continuations) == 1:  # nothing is shared: one causal run over the whole group
                tiles += _run(span.start, 0, 0, span.stop - span.start, window, block)
                continue
            tiles += _run(span.start, 0, 0, span.prefix, window, block)
            for length in span.continuations:
                tiles += _run(span.start, row - span.start - span.prefix, span.prefix, length, window, block)
                row += length
        return tiles


def _run(start: int, gap: int, prefix: int, length: int, window: int | None, block: int | None) -> list[Tile]:
    """Tiles of `length` rows at positions from `prefix` on; `gap` rows of siblings lie in between."""
    tiles = []
    step = block or max(length, 1)
    for first in range(prefix, prefix + length, step):
        last = min(first + step, prefix + length)
        seen = 0 if window is None else max(0, first - window + 1)
        shared = slice(start + seen, start + prefix)
        own = slice(start + gap + max(seen, prefix), start + gap + last)
        keys = (shared, own) if seen < prefix else (own,)
        tiles.append(Tile(slice(start + gap + first, start + gap + last), keys, first - seen))
    return tiles


@lru_cache(maxsize=16)
def causal_mask(
    rows: int, columns: int, offset: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Additive mask [n, m]: 0 where query i sees key j, -inf elsewhere.

    Query i sees key j if ``i + offset - window < j <= i + offset``.
    """
    with torch.inference_mode(False):  # it is cached, and a tensor made in inference mode cannot be saved
        query = torch.arange(rows, device=device)[:, None] + offset
        key = torch.arange(columns, device=device)[None, :]
        seen = key <= query
        if window is not None:
            seen &= key > query - window
        return torch.zeros(rows, columns, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
