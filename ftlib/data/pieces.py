"""Segments to the pieces that are tokenised: one per stretch between two generation boundaries.

A stretch is cut further only where people's text looks like a control token, and, for tokenizers that
mark the start of a text, at the first control token of a text that continues another.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

from ftlib.data.segments import Segment, Segments
from ftlib.data.tokens import Piece, TokenBackend

__all__ = ["Stretches", "stretches"]


@final
@dataclass(frozen=True)
class Stretches:
    """The pieces of one example.

    Args:
        prefix: pieces before the first trained boundary; `None` if the example has no such boundary.
        rest: pieces from there on.
        control: control tokens that are meant as such.
        literal: control tokens in people's text, spelled out.
    """

    prefix: tuple[Piece, ...] | None
    rest: tuple[Piece, ...]
    control: int
    literal: int


def stretches(
    segments: Segments, weights: Sequence[float], backend: TokenBackend, *, apart: bool = False
) -> Stretches:
    """Cut an example at the boundaries of what is trained.

    Args:
        segments: the example.
        weights: one per part; a boundary counts only where its part has weight, or is a tail.
        backend: says what a control token is and how it is spelled out.
        apart: what follows the first boundary begins a sequence of its own, as a decoder's does.

    Raises:
        DataError: a control token in people's text that cannot be spelled out.
    """
    parts = segments.parts
    # what stands after a scored word is cut off from it too
    cuts = [i for i, p in enumerate(parts) if p.boundary and (weights[i] > 0 or p.role == "tail")]
    edges = [0, *cuts, len(segments.parts)]
    pieces: list[list[Piece]] = []
    control = 0
    starts = True
    for begin, end in itertools.pairwise(edges):
        stretch = _Stretch(segments.parts[begin:end], weights[begin:end], backend.control)
        pieces.append(list(_pieces(stretch, backend, starts=starts)))
        starts = (starts and not stretch.text) or (apart and begin == 0)
        control += len(stretch.meant)
    rest = tuple(piece for stretch in (pieces[1:] if cuts else pieces) for piece in stretch)
    prefix = tuple(pieces[0]) if cuts else None
    literal = sum(piece.ids is not None for piece in (*(prefix or ()), *rest))
    return Stretches(prefix, rest, control, literal)


class _Stretch:
    """Joined text of some parts, with the ranges of weights and of people's own words.

    Args:
        parts: what is joined.
        weights: one per part.
        control: matches control tokens, of which those in people's words are `spelled`, the others `meant`.
    """

    def __init__(self, parts: Sequence[Segment], weights: Sequence[float], control: re.Pattern[str]) -> None:
        self.text = "".join(part.text for part in parts)
        self._runs: list[tuple[int, float]] = []
        self._words: list[tuple[int, int]] = []
        end = 0
        for part, weight in zip(parts, weights, strict=True):
            start, end = end, end + len(part.text)
            if not part.text:
                continue
            if self._runs and self._runs[-1][1] == weight:
                self._runs.pop()
            self._runs.append((end, weight))
            if not part.control:
                self._words.append((start, end))
        self.spelled: list[tuple[int, int]] = []
        self.meant: list[tuple[int, int]] = []
        for match in control.finditer(self.text):
            (self.spelled if self._written(*match.span()) else self.meant).append(match.span())

    def _written(self, start: int, end: int) -> bool:
        """Whether people wrote any of these characters."""
        return any(a < end and start < b for a, b in self._words)

    def whole(self, *, starts: bool) -> Piece:
        """All of it in one piece."""
        return Piece(self.text, tuple(self._runs), starts)

    def piece(self, start: int, end: int, *, starts: bool, ids: tuple[int, ...] | None = None) -> Piece:
        runs = [(min(stop, end) - start, weight) for stop, weight in self._runs if stop > start]
        last = next(i for i, (stop, _) in enumerate(runs) if stop == end - start)
        return Piece(self.text[start:end], tuple(runs[: last + 1]), starts, ids)


def _pieces(stretch: _Stretch, backend: TokenBackend, *, starts: bool) -> Iterator[Piece]:
    if stretch.text and not stretch.spelled and (starts or not backend.marks_start):  # nearly always
        yield stretch.whole(starts=starts)
        return
    done = 0
    for start, end in (*stretch.spelled, (len(stretch.text), len(stretch.text))):
        if start > done:
            at_start = starts and done == 0
            cut = (
                next((c for c, _ in stretch.meant if done <= c < start), start)
                if backend.marks_start and not at_start
                else start
            )
            if cut > done:
                yield stretch.piece(done, cut, starts=at_start)
            if cut < start:  # from its first control token on, the text is tokenised as usual
                yield stretch.piece(cut, start, starts=True)
        if end > start:
            yield stretch.piece(start, end, starts=False, ids=backend.spell(stretch.text[start:end]))
        done = end
