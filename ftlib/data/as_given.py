"""Formatters for rows that are final: text in weighted stretches, and token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from ftlib.data.segments import Row, Segment, Segments, Tokens
from ftlib.errors import ConfigError, DataError

__all__ = ["TokenRows", "WeightedSegments"]


@final
@dataclass(frozen=True)
class WeightedSegments:
    """Rows with `segments`: their text is final, so nothing is put before, between or after it, and control
    tokens written in it are meant as such.
    """

    def __call__(self, row: Row) -> Segments:
        """The stretches, those of weight 0 as prompt."""
        given = row.get("segments")
        if not isinstance(given, list) or not given or not all(isinstance(span, Mapping) for span in given):
            raise DataError(
                f"expected segments with text and weight, got {given!r:.80}.",
                code="missing_column" if given is None else "bad_row",
                column="segments",
            )
        parts: list[Segment] = []
        before = 0.0
        for span in given:
            weight = float(span["weight"])
            starts = weight > 0 and not before and bool(parts)
            role: Any = "completion" if weight else "prompt"
            parts.append(Segment(span["text"], role, weight, control=True, boundary=starts))
            before = weight
        return Segments(tuple(parts), bos=False, eos=False)

    def row(self, prompt: str) -> Row:
        """The row of a bare prompt: one stretch of weight 0."""
        return {"segments": [{"text": prompt, "weight": 0.0}]}


@final
@dataclass(frozen=True)
class TokenRows:
    """Rows with `input_ids` and perhaps `labels` and `loss_weights`, or with the ids of a pair."""

    def __call__(self, row: Row) -> Tokens:
        """The ids as they are."""
        if row.get("chosen_ids") is not None:
            return Tokens(
                tuple(row.get("prompt_ids") or ()), (tuple(row["chosen_ids"]), tuple(row["rejected_ids"]))
            )
        ids, labels, weights = (row.get(name) for name in ("input_ids", "labels", "loss_weights"))
        if ids is None:
            raise DataError(
                f"expected input_ids, found {sorted(row)}.", code="missing_column", column="input_ids"
            )
        if weights is None and labels is not None:
            weights = [float(label != -100) for label in labels]
        return Tokens((), (tuple(ids),), None if weights is None else tuple(map(float, weights)))

    def row(self, prompt: str) -> Row:
        """No row: text has no ids before a tokenizer saw it.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "formatters.tokens: expected a row with input_ids, got text. Encode it with your tokenizer "
            f"first: {prompt!r:.40}."
        )
