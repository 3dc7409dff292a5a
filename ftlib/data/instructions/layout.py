"""A row of instruction data laid out, as text and as messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, final, runtime_checkable

from ftlib.data.segments import Message, Row, Segment, Segments, Skipped

__all__ = ["Instructed", "Instruction", "Kind", "as_messages", "prompt_text"]


@final
@dataclass(frozen=True)
class Instructed:
    """One row, up to where generation begins and from there on.

    Args:
        prompt: what the model reads, as text.
        completion: what it learns to write; None at inference.
        turns: what it reads as messages, the last one the user's.
    """

    prompt: tuple[Segment, ...]
    completion: str | None
    turns: tuple[Message, ...]


@runtime_checkable
class Kind(Protocol):
    """A kind of instruction template."""

    def __call__(self, row: Row, /) -> Instructed | Skipped:
        """The row laid out, or why it is left out."""

    def row(self, prompt: str, /) -> Row:
        """The row that stands for a bare prompt at inference."""


@final
@dataclass(frozen=True)
class Instruction:
    """A kind as plain text. See `ftlib.formatters.instruction`."""

    kind: Kind

    def __call__(self, row: Row) -> Segments | Skipped:
        """Text with a hard cut where generation begins."""
        made = self.kind(row)
        if isinstance(made, Skipped):
            return made
        if made.completion is None:
            return Segments(made.prompt)
        return Segments((*made.prompt, Segment(made.completion, "completion", boundary=True)))

    def row(self, prompt: str) -> Row:
        """The row of a bare prompt."""
        return self.kind.row(prompt)


def as_messages(made: Instructed) -> tuple[tuple[Message, ...], int]:
    """The row as messages, and how many of them are given."""
    answer = () if made.completion is None else ({"role": "assistant", "content": made.completion},)
    return (*made.turns, *answer), len(made.turns)


def prompt_text(segments: Sequence[Segment]) -> str:
    """The text of some segments."""
    return "".join(segment.text for segment in segments)
