"""How one answer is laid out: as plain text, behind its prompt, or as the last turns of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

from ftlib.data.instructions import Kind
from ftlib.data.instructions.layout import as_messages
from ftlib.data.messages import dicts_of, restored
from ftlib.data.segments import Conversation, Message, Row, Segment, Segments, Skipped
from ftlib.errors import ConfigError, DataError

__all__ = ["Chat", "ControlPolicy", "EosPolicy", "PromptCompletion", "Text", "one_of"]

EosPolicy = Literal["append", "none"]
ControlPolicy = Literal["text", "parse"]


@final
@dataclass(frozen=True)
class Text:
    """See `formatters.text`."""

    column: str = "text"
    eos: EosPolicy = "append"
    control: ControlPolicy = "text"

    def __post_init__(self) -> None:
        one_of("text", "eos", self.eos, ("append", "none"))
        one_of("text", "control", self.control, ("text", "parse"))

    def __call__(self, row: Row) -> Segments:
        """The text as one segment."""
        value = _string(row, self.column)
        part = Segment(value, "text", control=self.control == "parse")
        return Segments((part,), eos=self.eos == "append")

    def row(self, prompt: str) -> Row:
        """The row of a bare prompt."""
        return {self.column: prompt}


@final
@dataclass(frozen=True)
class PromptCompletion:
    """See `formatters.prompt_completion`."""

    separator: str = ""
    ending: str | None = None
    control: ControlPolicy = "text"

    def __post_init__(self) -> None:
        one_of("prompt_completion", "control", self.control, ("text", "parse"))

    def __call__(self, row: Row) -> Segments:
        """The prompt with its separator, then the completion with its ending."""
        control = self.control == "parse"
        completion = "" if row.get("completion") is None else _string(row, "completion") + (self.ending or "")
        return Segments(
            (
                Segment(_string(row, "prompt") + self.separator, "prompt", control=control),
                Segment(completion, "completion", control=control, boundary=True),
            )
        )

    def row(self, prompt: str) -> Row:
        """The row of a bare prompt."""
        return {"prompt": prompt}


@final
@dataclass(frozen=True)
class Chat:
    """See `formatters.chat`."""

    template: str | None = None
    system: str | None = None
    kind: Kind | None = None

    def __call__(self, row: Row) -> Conversation | Skipped:
        """The messages of the row."""
        if self.kind is not None:
            made = self.kind(row)
            if isinstance(made, Skipped):
                return made
            messages, given = as_messages(made)
            return Conversation(messages, None, given, self.template, self.system)
        prompt = row.get("prompt")
        if prompt is None:
            messages, given = _messages(row, "messages"), 0
        else:
            messages, given = _messages(row, "prompt"), len(prompt)
            if row.get("completion") is not None:
                messages += _messages(row, "completion")
        return Conversation(
            messages, tuple(dicts_of(row.get("tools"), "tools")) or None, given, self.template, self.system
        )

    def row(self, prompt: str) -> Row:
        """The row of a bare prompt: one user turn."""
        if self.kind is not None:
            return self.kind.row(prompt)
        return {"prompt": [{"role": "user", "content": prompt}]}


def _string(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(
            f"expected text, got {value!r:.80}. The row has {sorted(row)}; name the column or map it.",
            code="missing_column" if value is None else "bad_row",
            column=column,
        )
    return value


def _messages(row: Row, column: str) -> tuple[Message, ...]:
    value = row.get(column)
    if (
        not isinstance(value, Sequence)
        or not value
        or not all(isinstance(message, Mapping) for message in value)
    ):
        raise DataError(
            f"expected a list of messages, got {value!r:.80}. The row has {sorted(row)}.",
            code="missing_column" if value is None else "bad_row",
            column=column,
        )
    return tuple(restored(message, f"{column}[{k}]") for k, message in enumerate(value))


def one_of(owner: str, option: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value of an option that is not among those allowed.

    Raises:
        ConfigError: it is not.
    """
    if value not in allowed:
        raise ConfigError(f"{owner}: expected {option} as one of {list(allowed)}, got {value!r}.")
