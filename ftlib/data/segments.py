"""What a formatter returns: text whose parts carry their role in the loss, not yet tokenised.

`Segments` are final text. `Conversation` is a list of messages that only the tokenizer's own template
can turn into text; the encoder does that and gets `Segments`. `Answers` are several of either, which
answer one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, final, runtime_checkable

__all__ = [
    "OUTPUT",
    "Answers",
    "Conversation",
    "Formatter",
    "Made",
    "Message",
    "Role",
    "Row",
    "Segment",
    "Segments",
    "Skipped",
    "Tokens",
    "TrainOn",
]

Row = Mapping[str, Any]
Message = Mapping[str, Any]

Role = Literal["text", "prompt", "completion", "assistant", "tail"]
OUTPUT: frozenset[str] = frozenset({"text", "completion", "assistant"})  # what a model learns to write


@final
@dataclass(frozen=True)
class Segment:
    """A stretch of text with one loss weight.

    Args:
        text: final text, to be tokenised as it stands.
        role: `text`, `completion` and `assistant` are what the model writes; `prompt` is what it
            reads; `tail` is what a template puts after a turn's stop token.
        weight: explicit loss weight from the data, >= 0; `None` leaves it to `train_on`.
        control: the control tokens written in this text are meant as such. Text that people wrote
            says False: there ``<|im_end|>`` stays ten ordinary characters.
        boundary: the model starts to write here, so no token may span the start of this segment.
        cut: the side from which this text may be shortened where the example is longer than
            `max_length`; `None` leaves it whole.
    """

    text: str
    role: Role
    weight: float | None = None
    control: bool = False
    boundary: bool = False
    cut: Literal["left", "right"] | None = None


@final
@dataclass(frozen=True)
class Segments:
    """One example as text.

    Args:
        parts: the segments in order.
        bos: the example starts with what the tokenizer itself puts before plain text (a BOS token,
            or nothing); False for rendered templates, which write their own.
        eos: the example ends in the tokenizer's EOS, weighted like the last part; never doubled.
        closed: the example ends in what the tokenizer itself puts after plain text (BERT's separator, or
            nothing), of weight 0: for text that is scored, not written.
    """

    parts: tuple[Segment, ...]
    bos: bool = True
    eos: bool = True
    closed: bool = False

    @property
    def text(self) -> str:
        """The whole text, without BOS and EOS."""
        return "".join(part.text for part in self.parts)


@final
@dataclass(frozen=True)
class Conversation:
    """Messages to be rendered by the tokenizer's chat template.

    Args:
        messages: dicts with `role` and `content`, as templates read them.
        tools: tool schemas, or `None`; never an empty list, for which some templates print text.
        given: leading messages that belong to the prompt and are trained only by `train_on`
            ``"assistant"`` and ``"all"``.
        template: template text that replaces the tokenizer's own.
        system: `None` leaves the system text to the template, ``""`` asks for none, other text is
            used where the messages bring none.
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None = None
    given: int = 0
    template: str | None = None
    system: str | None = None


@final
@dataclass(frozen=True)
class Answers:
    """Several answers to one prompt. The encoder stores what they share once.

    Args:
        examples: each answer laid out with the prompt, as the example it would be by itself; at least
            two, of a pair the better one first.
        extras: name -> one number per answer, such as `rank` (1 = best; without it their order is the
            rank) or `margin`. Every row of a data set has the same names.
    """

    examples: tuple[Segments | Conversation, ...]
    extras: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Skipped:
    """A row that is left out on purpose; the report counts it as dropped for this reason."""

    reason: str


@final
@dataclass(frozen=True)
class Tokens:
    """An example that is tokenised already; the encoder checks it and takes it as it is.

    Args:
        prompt: ids that come first and weigh nothing, shared by all answers.
        answers: ids after the prompt; of several the better one first.
        weights: one per id of a single answer; `None` where the row does not say.
    """

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...] | None = None


Made = Segments | Conversation | Answers | Skipped | Tokens


@runtime_checkable
class Formatter(Protocol):
    """A row to what is trained on. Plain functions are accepted wherever a formatter is."""

    def __call__(self, row: Row, /) -> Made:
        """The example of one row; a row without its completion gives the prompt alone."""
        ...

    def row(self, prompt: str, /) -> Row:
        """The row that stands for a bare prompt at inference."""
        ...


TrainOn = Literal["completion", "assistant", "last", "all", "weighted"] | Callable[[Segments], Any]
