"""Encoded rows as people read them: what the model gets, and which tokens are trained.

Trained stretches stand between ``[[`` and ``]]``; terminals add a background colour and notebooks
background and underline, so colour is never the only signal.
"""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, final

from ftlib.data.rows import Example
from ftlib.data.tokens import TokenBackend

__all__ = ["Preview", "PreviewRow", "preview_row"]

_RESET = "\x1b[0m"
_GREENS = (22, 28, 34)  # of the 256 terminal colours, darker for smaller loss weights
_STYLE = (
    "white-space:pre-wrap;font-family:monospace;border-left:3px solid #888;padding-left:8px;margin:4px 0 12px"
)


@final
@dataclass(frozen=True)
class PreviewRow:
    """One example.

    Args:
        source: where it came from, ``file:row``.
        ids: all token ids.
        tokens: the vocabulary's name of each id.
        weights: the loss weight of each id.
        spans: (text, weight) of each stretch of equal weight; the texts join to the decoded example.
        stops: the last trained token ends the turn.
        truncated: it was cut to the encoder's `max_length`.
        dropped: why it is left out, or `None`.
    """

    source: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    weights: tuple[float, ...]
    spans: tuple[tuple[str, float], ...]
    stops: bool
    truncated: bool
    dropped: str | None

    @property
    def trained_share(self) -> float:
        """Tokens of weight > 0 over all tokens, 0 to 1."""
        return sum(weight > 0 for weight in self.weights) / max(len(self.weights), 1)

    @property
    def heading(self) -> str:
        """Tokens, trained tokens and their share, whether the stop token is trained."""
        trained = sum(weight > 0 for weight in self.weights)
        facts = [
            f"{self.source}: {len(self.ids)} tokens, {trained} trained ({self.trained_share:.0%})",
            "stop token trained" if self.stops else "NO stop token trained",
        ]
        facts += ["truncated"] if self.truncated else []
        facts += [f"DROPPED, {self.dropped}"] if self.dropped else []
        return ", ".join(facts)


@final
@dataclass(frozen=True)
class Preview:
    """Some examples; print it, leave it as the last line of a notebook cell, or read `text`."""

    rows: tuple[PreviewRow, ...]

    @property
    def text(self) -> str:
        """Plain text with ``[[…]]`` around what is trained."""
        return self._joined(lambda text, _: f"[[{text}]]")

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data: ids, tokens, weights and spans of each row."""
        return [
            {
                "source": row.source,
                "ids": list(row.ids),
                "tokens": list(row.tokens),
                "weights": list(row.weights),
                "spans": [list(span) for span in row.spans],
                "heading": row.heading,
            }
            for row in self.rows
        ]

    def __str__(self) -> str:
        coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        return self._joined(_coloured) if coloured else self.text

    __repr__ = __str__

    def _joined(self, mark: Any) -> str:
        return "\n\n".join(
            f"--- {row.heading}\n"
            + "".join(mark(text, weight) if weight > 0 else text for text, weight in row.spans)
            for row in self.rows
        )

    def _repr_html_(self) -> str:
        legend = "<p>Underlined on green: trained. Hover for the loss weight.</p>"
        return legend + "".join(
            f"<p><b>{html.escape(row.heading)}</b></p>"
            f"<div dir='auto' style='{_STYLE}'>{''.join(_html(row))}</div>"
            for row in self.rows
        )


def preview_row(example: Example, backend: TokenBackend, stop_ids: frozenset[int]) -> PreviewRow:
    """One encoded example with its text."""
    ids = example.prefix[0] + example.rest[0]
    weights = example.prefix[1] + example.rest[1]
    trained = [i for i, weight in zip(ids, weights, strict=True) if weight > 0]
    return PreviewRow(
        source=example.source,
        ids=tuple(ids),
        tokens=tuple(backend.tokenizer.convert_ids_to_tokens(ids)),
        weights=tuple(weights),
        spans=tuple(_spans(ids, weights, backend)),
        stops=bool(trained) and trained[-1] in stop_ids,
        truncated="truncated" in example.notes,
        dropped=example.dropped,
    )


def _spans(ids: list[int], weights: list[float], backend: TokenBackend) -> Iterator[tuple[str, float]]:
    """Text of each stretch of equal weight: what its tokens add to the text of all tokens before."""
    done = 0
    before = ""
    for weight, members in groupby(weights):
        done += sum(1 for _ in members)
        through = backend.decode(ids[:done])
        # A character cut by the stretch decodes to U+FFFD until its last byte is there.
        shared = len(before) if through.startswith(before) else len(before.rstrip("\ufffd"))
        yield through[shared:], weight
        before = through


def _coloured(text: str, weight: float) -> str:
    shade = _GREENS[min(int(weight * len(_GREENS)), len(_GREENS) - 1)]
    # Each line is coloured by itself: a background that runs over a line break fills the terminal's width.
    lines = (f"\x1b[97;48;5;{shade}m{line}{_RESET}" for line in f"[[{text}]]".split("\n"))
    return "\n".join(lines)


def _html(row: PreviewRow) -> Iterator[str]:
    for text, weight in row.spans:
        if weight > 0:
            alpha = 0.25 + 0.35 * min(weight, 1.0)
            yield (
                f"<span title='weight {weight:g}' style='background:rgba(60,160,80,{alpha:.2f});"
                f"text-decoration:underline'>{html.escape(text)}</span>"
            )
        else:
            yield html.escape(text)
