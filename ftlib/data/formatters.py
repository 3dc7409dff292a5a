"""Formatters: a row to the text that is trained on, its parts marked by their role in the loss.

A formatter decides the text, `train_on` of the encoder decides what of it is learned, and the encoder
alone tokenises. Any function from a row to `Segments` or `Conversation` is a formatter too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

from ftlib.data.messages import dicts_of, restored
from ftlib.data.segments import Conversation, Formatter, Message, Row, Segment, Segments
from ftlib.errors import ConfigError, DataError

__all__ = ["Chat", "PromptCompletion", "Text", "chat", "prompt_completion", "text"]

EosPolicy = Literal["append", "none"]
ControlPolicy = Literal["text", "parse"]


@final
@dataclass(frozen=True)
class Text:
    """See `text`."""

    column: str = "text"
    eos: EosPolicy = "append"
    control: ControlPolicy = "text"

    def __post_init__(self) -> None:
        _one_of("text", "eos", self.eos, ("append", "none"))
        _one_of("text", "control", self.control, ("text", "parse"))

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
    """See `prompt_completion`."""

    separator: str = ""
    ending: str | None = None
    control: ControlPolicy = "text"

    def __post_init__(self) -> None:
        _one_of("prompt_completion", "control", self.control, ("text", "parse"))

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
    """See `chat`."""

    template: str | None = None
    system: str | None = None

    def __call__(self, row: Row) -> Conversation:
        """The messages of the row."""
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
        return {"prompt": [{"role": "user", "content": prompt}]}


def text(column: str = "text", *, eos: EosPolicy = "append", control: ControlPolicy = "text") -> Formatter:
    """Plain text, all of it learned.

    Args:
        column: where the text stands.
        eos: ``"append"`` ends each text in one EOS token, ``"none"`` adds none.
        control: ``"text"`` keeps ``<|im_end|>`` and the like in the data ordinary characters;
            ``"parse"`` reads them as control tokens, for text that was rendered by a template.
    """
    return Text(column, eos, control)


def prompt_completion(
    *, separator: str = "", ending: str | None = None, control: ControlPolicy = "text"
) -> Formatter:
    """A prompt that is read and a completion that is learned, both strings; no chat template.

    Args:
        separator: text between the two, part of the prompt, so inference uses it too.
        ending: text after the completion, learned. A trained EOS follows in any case.
        control: as in `text`.
    """
    return PromptCompletion(separator, ending, control)


def chat(*, template: str | None = None, system: str | None = None) -> Formatter:
    """Messages rendered by the tokenizer's own chat template.

    Rows hold `messages`, or `prompt` and `completion` as message lists, and perhaps `tools`.

    Args:
        template: template text used in place of the tokenizer's.
        system: `None` leaves the system text to the template, ``""`` asks for none, other text is
            put before conversations that bring no system message.
    """
    return Chat(template, system)


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


def _one_of(owner: str, option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{owner}: expected {option} as one of {list(allowed)}, got {value!r}.")
