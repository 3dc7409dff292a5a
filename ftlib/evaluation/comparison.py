"""Answers of two models to the same prompts, side by side: before and after, or one run and another."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import Any, Protocol, final, runtime_checkable

from torch import nn

from ftlib.checks import TEXT, Wanted, check
from ftlib.data.preview import visible
from ftlib.errors import ConfigError, DataError

__all__ = ["Comparison", "compare"]

TWO_NAMES = Wanted(
    "two different texts",
    lambda value: (
        isinstance(value, list | tuple) and all(map(TEXT.holds, value)) and len(value) == len({*value}) == 2
    ),
)
PROMPTS = Wanted(
    "a list of prompts", lambda value: isinstance(value, Sequence) and not isinstance(value, str | bytes)
)
COLUMN = 38  # characters of a column of text
_CELL = "white-space:pre-wrap;overflow-wrap:anywhere;text-align:left;vertical-align:top"


@runtime_checkable
class Writes(Protocol):
    """What completes prompts, such as a trainer."""

    def generate(self, prompts: Sequence[Any], /, **options: Any) -> list[str]:
        """One completion per prompt."""


Answers = Sequence[str] | Callable[[Sequence[Any]], Sequence[str]] | Writes


@final
@dataclass(frozen=True)
class Comparison:
    """Two answers to each prompt; print it, leave it as the last line of a notebook cell, or read it.

    Args:
        prompts: as text.
        answers: two to each.
        names: of the two sides.
    """

    prompts: tuple[str, ...]
    answers: tuple[tuple[str, str], ...]
    names: tuple[str, str]

    @property
    def differing(self) -> int:
        """How many prompts have two different answers."""
        return sum(a != b for a, b in self.answers)

    def to_dict(self) -> list[dict[str, str]]:
        """One row per prompt: the prompt, and each answer under the name of its side."""
        names = self.names
        rows = zip(self.prompts, self.answers, strict=True)
        return [{"prompt": prompt, names[0]: a, names[1]: b} for prompt, (a, b) in rows]

    @property
    def text(self) -> str:
        """Two columns under each prompt."""
        blocks = [
            f"--- {visible(prompt)}\n{_columns(*self.names)}\n{_columns(*pair)}"
            for prompt, pair in zip(self.prompts, self.answers, strict=True)
        ]
        return "\n\n".join([self._summary, *blocks])

    def __str__(self) -> str:
        return self.text

    __repr__ = __str__

    @property
    def _summary(self) -> str:
        return f"{self.differing} of {len(self.answers)} answers differ"

    def _repr_html_(self) -> str:
        head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in ("prompt", *self.names))
        rows = zip(self.prompts, self.answers, strict=True)
        body = "".join(f"<tr>{''.join(map(_cell, (prompt, *pair)))}</tr>" for prompt, pair in rows)
        return f"<p>{self._summary}</p><table><tr>{head}</tr>{body}</table>"


def compare(
    a: Answers,
    b: Answers,
    prompts: Sequence[Any],
    *,
    names: tuple[str, str] = ("a", "b"),
    **generation_options: Any,
) -> Comparison:
    """Let both sides answer the same prompts.

    Args:
        a: a trainer, a function of prompts, or answers that are there already, such as those from before
            training.
        b: likewise.
        prompts: as `SFTTrainer.generate` takes them.
        names: what the two sides are called.
        generation_options: of a trainer's `generate`, such as ``max_new_tokens``.

    Raises:
        ConfigError: something else than the above, or options for sides that have none.
        DataError: no prompts, or another number of answers than of prompts.

    Example:
        >>> print(compare(["Yes."], lambda prompts: ["No."], ["Is it raining?"], names=("before", "after")))
        1 of 1 answers differ
        <BLANKLINE>
        --- Is it raining?
        before                                 | after
        Yes.                                   | No.
    """
    check("compare", {"prompts": (prompts, PROMPTS)})
    if not prompts:
        raise DataError("compare: expected at least one prompt, got none.", code="empty_data")
    check("compare", {"names": (names, TWO_NAMES)})
    if generation_options and not any(isinstance(side, Writes) for side in (a, b)):
        raise ConfigError(
            f"compare: {', '.join(generation_options)} has no effect without a trainer on either side. "
            "Leave it out."
        )
    sides = [
        _answers(side, prompts, generation_options, name) for side, name in zip((a, b), names, strict=True)
    ]
    return Comparison(
        tuple(map(_prompt_text, prompts)), tuple(zip(*sides, strict=True)), (names[0], names[1])
    )


def _answers(side: Any, prompts: Sequence[Any], options: Mapping[str, Any], name: str) -> list[str]:
    if isinstance(side, nn.Module) or not (callable(side) or isinstance(side, Writes | list | tuple)):
        raise ConfigError(
            f"compare: {name}: expected a trainer, a function of prompts or a list of answers, got "
            f"{type(side).__name__}. Of a model, give what its trainer's generate(prompts) returns."
        )
    if isinstance(side, Writes):
        side = side.generate(prompts, **options)
    given = list(side(prompts) if callable(side) else side)
    if len(given) != len(prompts) or not all(isinstance(answer, str) for answer in given):
        raise DataError(
            f"compare: {name}: expected one text for each of {len(prompts)} prompts, got {len(given)} "
            f"answers: {given!r:.100}.",
            code="answers",
        )
    return given


def _prompt_text(prompt: Any) -> str:
    """A prompt as people read it: text, turns of a conversation, or a row that holds either."""
    if isinstance(prompt, Mapping):
        return _prompt_text(prompt.get("prompt", ""))
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _cell(text: str) -> str:
    return f"<td dir='auto' style='{_CELL}'>{escape(visible(text))}</td>"


def _columns(left: str, right: str) -> str:
    rows = zip_longest(_lines(left), _lines(right), fillvalue="")
    return "\n".join(f"{a}{' ' * (COLUMN - _width(a))} | {b}".rstrip() for a, b in rows)


def _lines(text: str) -> list[str]:
    lines = []
    for line in visible(text).expandtabs(4).split("\n"):
        room = COLUMN if _width(line) == len(line) else COLUMN // 2  # a wide character takes two columns
        lines += textwrap.wrap(line, room) or [""]
    return lines


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text)
