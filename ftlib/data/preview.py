"""Encoded rows as people read them: what the model gets, and which tokens are trained.

Trained stretches stand between ``[[`` and ``]]``; terminals add a background colour and notebooks
background and underline, so colour is never the only signal. Characters that would steer the terminal or
turn the direction of reading are shown by name, so that no row can disguise what is trained.
"""

from __future__ import annotations

import html
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, final

from ftlib.data.examples import Example
from ftlib.data.stops import stop_is_trained
from ftlib.data.tokens import TokenBackend

__all__ = ["Preview", "PreviewRow", "preview_row", "visible"]

_RESET = "\x1b[0m"
_GREENS = (22, 28, 34)  # of the 256 terminal colours, darker for smaller loss weights
_STYLE = (
    "white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;"
    "border-left:3px solid #888;padding-left:8px;margin:4px 0 12px"
)
# Controls but for tab and newline, and what overrides the direction of reading.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


Spans = tuple[tuple[str, float], ...]  # (text, weight)


@final
@dataclass(frozen=True)
class PreviewRow:
    """One example.

    Args:
        source: where it came from, ``file:row``.
        ids: all token ids, the shared prompt of several answers once.
        tokens: the vocabulary's name of each id.
        weights: the loss weight of each id.
        spans: (text, weight) of each stretch of equal weight; the texts join to the decoded example, or
            to the prompt of several answers.
        answers: (label, spans) of each of several answers.
        stops: the last trained turn ends in its stop token, of every answer.
        truncated: it was cut to the encoder's `max_length`.
        dropped: why it is left out, or `None`.
        control_text: people's text in it spells control tokens; it was kept as ordinary characters.
    """

    source: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    weights: tuple[float, ...]
    spans: Spans
    stops: bool
    truncated: bool
    dropped: str | None
    answers: tuple[tuple[str, Spans], ...] = ()
    control_text: bool = False

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
        facts += ["control-token text kept as text"] if self.control_text else []
        facts += [f"DROPPED, {self.dropped}"] if self.dropped else []
        return ", ".join(facts)


@final
@dataclass(frozen=True)
class Preview:
    """Some examples; print it, leave it as the last line of a notebook cell, or read `text`."""

    rows: tuple[PreviewRow, ...]

    @property
    def text(self) -> str:
        """Plain text with ``[[…]]`` around what is trained, whatever its weight."""
        return self._joined(lambda text, _: f"[[{text}]]")

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data: ids, tokens, weights, spans and answers of each row."""
        return [
            {
                "source": row.source,
                "ids": list(row.ids),
                "tokens": list(row.tokens),
                "weights": list(row.weights),
                "spans": [list(span) for span in row.spans],
                "answers": [[label, [list(span) for span in spans]] for label, spans in row.answers],
                "heading": row.heading,
            }
            for row in self.rows
        ]

    def __str__(self) -> str:
        coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        return self._joined(_coloured) if coloured else self.text

    __repr__ = __str__

    def _joined(self, mark: Any) -> str:
        def marked(spans: Spans) -> str:
            shown = ((visible(text), weight) for text, weight in spans)
            return "".join(mark(text, weight) if weight > 0 else text for text, weight in shown)

        return "\n\n".join(
            f"--- {row.heading}\n"
            + marked(row.spans)
            + "".join(f"\n--> {label}: {marked(spans)}" for label, spans in row.answers)
            for row in self.rows
        )

    def _repr_html_(self) -> str:
        legend = (
            f"<p><span style='{_trained_style(1.0)}'>Underlined on green</span>: trained, the greener the "
            "larger the loss weight. Hover for its value.</p>"
        )
        return legend + "".join(
            f"<p><b>{html.escape(row.heading)}</b></p>"
            f"<div dir='auto' style='{_STYLE}'>{''.join(_html(row.spans))}</div>"
            + "".join(
                f"<p>{html.escape(label)}</p><div dir='auto' style='{_STYLE}'>{''.join(_html(spans))}</div>"
                for label, spans in row.answers
            )
            for row in self.rows
        )


def preview_row(example: Example, backend: TokenBackend, stop_ids: frozenset[int]) -> PreviewRow:
    """One encoded example with its text."""
    prompt_ids, prompt_weights = example.prefix
    ids = [*prompt_ids, *(i for part, _ in example.continuations for i in part)]
    weights = [*prompt_weights, *(weight for _, part in example.continuations for weight in part)]
    answers: tuple[tuple[str, Spans], ...] = ()
    if len(example.continuations) > 1:
        spans = tuple(_spans([], *example.prefix, backend))
        answers = tuple(
            (label, tuple(_spans(prompt_ids, *answer, backend)))
            for label, answer in zip(_labels(example), example.continuations, strict=True)
        )
    else:
        spans = tuple(_spans([], ids, weights, backend))
    return PreviewRow(
        source=example.source,
        ids=tuple(ids),
        tokens=tuple(backend.tokenizer.convert_ids_to_tokens(ids)),
        weights=tuple(weights),
        spans=spans,
        stops=all(
            stop_is_trained(prompt_ids + part, prompt_weights + marks, stop_ids, backend)
            for part, marks in example.continuations
        ),
        truncated="truncated" in example.notes,
        dropped=example.dropped,
        answers=answers,
        control_text="control_text" in example.notes,
    )


def _labels(example: Example) -> list[str]:
    """What each answer is, with its numbers."""
    count = len(example.continuations)
    names = ["chosen", "rejected"] if count == 2 else [f"answer {k}" for k in range(1, count + 1)]
    numbers = [
        ", ".join(f"{name} {values[k]:g}" for name, values in example.extras.items() if values[k])
        for k in range(count)
    ]
    return [f"{name} ({given})" if given else name for name, given in zip(names, numbers, strict=True)]


def _spans(
    done_ids: list[int], ids: list[int], weights: list[float], backend: TokenBackend
) -> Iterator[tuple[str, float]]:
    """Text of each stretch of equal weight: what its tokens add to the text of all tokens before."""
    done = len(done_ids)
    ids = done_ids + ids
    before = backend.decode(done_ids)
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


def _html(spans: Spans) -> Iterator[str]:
    for text, weight in spans:
        shown = html.escape(visible(text))
        if weight > 0:
            yield f"<span title='weight {weight:g}' style='{_trained_style(weight)}'>{shown}</span>"
        else:
            yield shown


def _trained_style(weight: float) -> str:
    alpha = 0.25 + 0.35 * min(weight, 1.0)
    return f"background:rgba(60,160,80,{alpha:.2f});text-decoration:underline"


def visible(text: str) -> str:
    """The text with characters by name that would steer a terminal or turn the direction of reading."""
    return _STEERING.sub(lambda found: f"<U+{ord(found[0]):04X}>", text)
