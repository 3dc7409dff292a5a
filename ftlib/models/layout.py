"""Which keys each query row of a packed batch may see, as plain integers.

A group lies flat as its prefix followed by its continuations. The prefix attends to itself
causally; a continuation attends to the prefix and, causally, to itself. Both are one case: a run of
query rows at sequence positions ``[start, stop)`` whose keys are the prefix rows and then its own.

Shapes: T all tokens of a packed batch, n query rows of a tile, m keys of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

from ftlib.batches import Span

__all__ = ["GroupLayout", "Tile", "causal_mask", "tile_mask"]


@final
@dataclass(frozen=True)
class Tile:
    """A block of query rows and the rows of the keys they see, all indices into T.

    Args:
        queries: slice of n rows.
        keys: one or two slices of m rows in all, in order of sequence position (prefix, then own).
        offset: position of the first query minus position of the first key, >= 0.
        groups: of a tile that holds several whole groups, where they lie in it; else empty.
    """

    queries: slice
    keys: tuple[slice, ...]
    offset: int
    groups: tuple[Span, ...] = ()

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
        self._tiles: dict[tuple[int | None, int | None, int], tuple[Tile, ...]] = {}

    @property
    def windows(self) -> set[int | None]:
        """The sliding windows that attention layers have asked for so far; None is full attention."""
        return {window for window, _, _ in self._tiles}

    def tiles(
        self, *, window: int | None = None, block: int | None = None, merge: int = 0
    ) -> tuple[Tile, ...]:
        """Tiles that cover every query row once.

        Args:
            window: sliding window in tokens, the query's own included; None sees everything.
            block: most query rows of a tile; None keeps each prefix and continuation whole.
            merge: neighbouring groups of up to this many rows together share a tile.
        """
        key = (window, block, merge)
        if key not in self._tiles:
            neighbours = _neighbours(self.spans, merge)
            self._tiles[key] = tuple(tile for spans in neighbours for tile in _cut(spans, window, block))
        return self._tiles[key]


def _neighbours(spans: Sequence[Span], most: int) -> list[list[Span]]:
    """Spans in order, gathered while they have at most `most` rows together."""
    gathered: list[list[Span]] = []
    for span in spans:
        if gathered and span.stop - gathered[-1][0].start <= most:
            gathered[-1].append(span)
        else:
            gathered.append([span])
    return gathered


def _cut(spans: list[Span], window: int | None, block: int | None) -> list[Tile]:
    """One tile of several groups, or the tiles of one."""
    first, last = spans[0], spans[-1]
    if len(spans) > 1:
        inside = tuple(replace(span, start=span.start - first.start) for span in spans)
        rows = slice(first.start, last.stop)
        return [Tile(rows, (rows,), 0, inside)]
    if len(first.continuations) == 1:  # nothing is shared: one causal run over the whole group
        return _run(first.start, 0, 0, first.stop - first.start, window, block)
    tiles = _run(first.start, 0, 0, first.prefix, window, block)
    gap = 0
    for length in first.continuations:
        tiles += _run(first.start, gap, first.prefix, length, window, block)
        gap += length
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


def tile_mask(tile: Tile, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask [n, m] of any tile: 0 where a query sees a key, -inf elsewhere."""
    if tile.groups:
        return _groups_mask(tile.groups, window, dtype, device)
    return causal_mask(tile.rows, tile.columns, tile.offset, window, dtype, device)


@lru_cache(maxsize=64)
def _groups_mask(
    groups: tuple[Span, ...], window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):
        rows = groups[-1].stop
        mask = torch.full((rows, rows), float("-inf"), dtype=dtype, device=device)
        for tile in GroupLayout(groups).tiles(window=window):
            own = causal_mask(tile.rows, tile.columns, tile.offset, window, dtype, device)
            for keys, part in zip(
                tile.keys, own.split([k.stop - k.start for k in tile.keys], 1), strict=True
            ):
                mask[tile.queries, keys] = part
        return mask
