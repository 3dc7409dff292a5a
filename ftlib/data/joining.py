"""One answer with its prompt from pieces to tokens: joined, with what stands around text, and checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import final

from ftlib.data.overflow import Weighted
from ftlib.data.pieces import Stretches
from ftlib.data.segments import Segments
from ftlib.data.tokens import Piece, TokenBackend
from ftlib.errors import DataError

__all__ = ["Joiner", "Side"]


@final
@dataclass(frozen=True)
class Side:
    """One answer with its prompt, ready for the tokenizer."""

    segments: Segments
    weights: tuple[float, ...]
    stretches: Stretches
    notes: tuple[str, ...]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All that is to be tokenised, in order."""
        return (*(self.stretches.prefix or ()), *self.stretches.rest)


@final
@dataclass(frozen=True)
class Joiner:
    """Puts encoded pieces together.

    Args:
        backend: knows BOS, EOS, and what else the tokenizer puts around text.
        apart: an encoder reads the prompt as a sequence of its own, and a decoder begins another.
    """

    backend: TokenBackend
    apart: bool = False

    def joined(self, side: Side, encoded: Iterator[Weighted]) -> tuple[Weighted | None, Weighted]:
        """Prompt and rest of one answer with BOS and EOS; no prompt where nothing marks its end."""
        parts = side.stretches
        prompt = None if parts.prefix is None else _concatenated(islice(encoded, len(parts.prefix)))
        rest = _concatenated(islice(encoded, len(parts.rest)))
        if prompt is None:
            rest = self._with_bos(*rest, side.segments)
        else:
            prompt = self.as_prompt(*prompt, side.segments)
            if self.apart:  # here BOS is predicted, by the token that a decoder starts from
                rest = self._with_bos(*rest, side.segments, weight=side.weights[-1])
        if side.segments.eos and self.backend.eos_id is not None and rest[0][-1:] != [self.backend.eos_id]:
            rest[0].append(self.backend.eos_id)
            rest[1].append(side.weights[-1])
        ending = list(self.backend.ending_ids) if side.segments.closed else []
        if ending and rest[0][-len(ending) :] != ending:
            rest = [*rest[0], *ending], [*rest[1], *([0.0] * len(ending))]
        return prompt, rest

    def _with_bos(
        self, ids: list[int], weights: list[float], segments: Segments, *, weight: float = 0.0
    ) -> Weighted:
        """What the tokenizer puts before plain text goes first, once; of weight 0 if nothing predicts it."""
        bos = list(self.backend.bos_ids) if segments.bos else []
        if ids[: len(bos)] == bos:
            return ids, weights
        return [*bos, *ids], [*([weight] * len(bos)), *weights]

    def as_prompt(self, ids: list[int], weights: list[float], segments: Segments) -> Weighted:
        """With BOS; for an encoder also with what the tokenizer puts after plain text, once."""
        ids, weights = self._with_bos(ids, weights, segments)
        ending = list(self.backend.ending_ids) if self.apart and segments.bos else []
        if not ending or ids[-len(ending) :] == ending:
            return ids, weights
        return [*ids, *ending], [*weights, *([0.0] * len(ending))]

    def check_control(self, side: Side, ids: Sequence[int]) -> None:
        """Control ids come from templates, BOS and EOS alone, and BOS stands at most once at the start."""
        around = len(self.backend.bos_ids)
        if self.apart:
            around += around + len(self.backend.ending_ids)
        if side.segments.closed:
            around += len(self.backend.ending_ids)
        allowed = side.stretches.control + side.segments.eos + (around if side.segments.bos else 0)
        found = sum(1 for i in ids if i in self.backend.control_ids)
        if found > allowed:
            raise DataError(
                f"expected at most {allowed} control tokens, got {found}: this tokenizer makes control "
                "tokens of ordinary text. Remove such text from the data.",
                code="control_token",
            )
        bos = list(self.backend.bos_ids)
        if bos and list(ids[: 2 * len(bos)]) == bos * 2:
            raise DataError(
                "expected one BOS, got two: the data bring their own. Remove it.", code="double_bos"
            )


def _concatenated(pieces: Iterable[Weighted]) -> Weighted:
    ids: list[int] = []
    weights: list[float] = []
    for piece_ids, piece_weights in pieces:
        ids += piece_ids
        weights += piece_weights
    return ids, weights
