"""Where a comparison stands in its row: which columns people use for prompts, pairs and ranked answers.

Data that name the better answer by a label of its own are `ftlib.data.formats.judged`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

from ftlib.data.cells import has, is_side
from ftlib.data.messages import is_message, is_message_list

__all__ = [
    "NUMBERS",
    "TEXTS",
    "PairColumns",
    "RankedColumns",
    "are_objects",
    "fits_pair",
    "fits_ranked",
    "is_comparison",
    "is_pair",
    "is_ranked",
    "is_request",
    "pair_columns",
    "present",
    "prompt_columns",
    "ranked_columns",
]

_PAIRS = (  # (chosen, rejected); `messages` end in the chosen answer
    ("chosen", "rejected"),
    ("accepted", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("preferred_output", "non_preferred_output"),
    ("preferred_completion", "non_preferred_completion"),
    ("response_j", "response_k"),
    ("messages", "rejected_response"),
    ("messages", "rejected_messages"),
    ("messages", "rejected_message"),
)
_PROMPTS = ("prompt", "question", "query", "instruction", "input", "conversations")
_ANSWERS = ("answers", "responses", "completions")
# Inside one answer of several, where answers are objects: its text, and its rank or score.
TEXTS = ("answer", "response", "completion", "text", "content")
NUMBERS: Mapping[str, tuple[str, ...]] = {"ranks": ("rank",), "scores": ("score", "overall_score")}


@final
@dataclass(frozen=True)
class PairColumns:
    """The columns of a pair; `prompt` names none, one, or instruction and input."""

    prompt: tuple[str, ...]
    chosen: str
    rejected: str

    @property
    def names(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.prompt, self.chosen, self.rejected, "margin")


@final
@dataclass(frozen=True)
class RankedColumns:
    """The columns of ranked answers; `numbers` is `ranks`, `scores` or `None`."""

    prompt: tuple[str, ...]
    answers: str
    numbers: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.prompt, self.answers, *([self.numbers] if self.numbers else []))


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether the row is about a pair, perhaps with one side missing."""
    return any(_could_be(row, pair) for pair in _pairs_among(tuple(row)))


def is_ranked(row: Mapping[str, Any]) -> bool:
    """Whether the row is about answers with ranks or scores, perhaps with some missing."""
    name = present(row, _ANSWERS)
    if name is None or not _asks_alone(row):
        return False
    return any(column in row for column in NUMBERS) or are_objects(row[name])


def is_comparison(row: Mapping[str, Any]) -> bool:
    """Whether the row compares answers: a pair, ranked answers, or answers in order of preference."""
    return is_pair(row) or is_ranked(row) or _is_ordered(row)


def fits_pair(row: Mapping[str, Any]) -> bool:
    """Both sides are there and usable, and so is the prompt, if there is one."""
    where = pair_columns(row)
    pair = where.chosen, where.rejected
    return _could_be(row, pair) and has(row, *pair) and _prompt_fits(row)


def fits_ranked(row: Mapping[str, Any]) -> bool:
    """A prompt with two answers or more, with ranks, with scores, or in order of preference."""
    answers = row.get(ranked_columns(row).answers)
    if not isinstance(answers, Sequence) or isinstance(answers, str) or len(answers) < 2:
        return False
    return _prompt_fits(row) and (is_ranked(row) or _is_ordered(row))


def pair_columns(row: Mapping[str, Any]) -> PairColumns:
    """Where the pair of this row stands: the first spelling that is usable, or else the nearest to it."""
    # Of equals `max` takes the first.
    known = _PAIRS[0], *_pairs_among(tuple(row))
    chosen, rejected = max(known, key=lambda pair: (_could_be(row, pair), has(row, *pair)))
    return PairColumns(() if chosen == "messages" else prompt_columns(row), chosen, rejected)


def ranked_columns(row: Mapping[str, Any]) -> RankedColumns:
    """Where the answers of this row stand."""
    return RankedColumns(prompt_columns(row), present(row, _ANSWERS) or "answers", present(row, NUMBERS))


def prompt_columns(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The column of the prompt, or those of an instruction and its input; empty without a prompt."""
    name = present(row, _PROMPTS)
    if name == "instruction" and isinstance(row.get("input"), str):
        return ("instruction", "input")
    return () if name is None else (name,)


def present(row: Mapping[str, Any], names: Sequence[str] | Mapping[str, Any]) -> str | None:
    """The first of `names` that the row has; null counts as absent."""
    return next((name for name in names if has(row, name)), None)


def is_request(value: object) -> bool:
    """A prompt inside an object with `messages`."""
    return isinstance(value, Mapping) and is_message_list(value.get("messages"))


def are_objects(answers: object) -> bool:
    """Answers as objects that hold their own rank or score."""
    names = [name for spellings in NUMBERS.values() for name in spellings]
    return (
        isinstance(answers, Sequence)
        and any(isinstance(answer, Mapping) and present(answer, names) is not None for answer in answers)
        and not is_message_list(answers)
    )


@lru_cache(maxsize=256)
def _pairs_among(columns: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The pairs that these columns hold both sides of: mostly none, and the same for all rows of a file."""
    return tuple(pair for pair in _PAIRS if set(pair) <= set(columns))


def _could_be(row: Mapping[str, Any], pair: tuple[str, str]) -> bool:
    if not all(map(row.__contains__, pair)):
        return False
    values = [row[name] for name in pair]
    return (
        any(value is not None for value in values)
        and all(value is None or _is_answer(value) for value in values)
        and not (pair[0] == "messages" and isinstance(values[0], str))
    )


def _is_ordered(row: Mapping[str, Any]) -> bool:
    """A prompt with several `answers` and nothing else to learn: they count as best first."""
    answers = row.get("answers")
    several = isinstance(answers, Sequence) and not isinstance(answers, str) and len(answers) > 1
    return several and _asks_alone(row) and all(map(_is_answer, row["answers"]))


def _asks_alone(row: Mapping[str, Any]) -> bool:
    """A prompt without a completion of its own."""
    return bool(prompt_columns(row)) and not has(row, "completion") and not has(row, "messages")


def _prompt_fits(row: Mapping[str, Any]) -> bool:
    return all(is_side(row[name]) or is_request(row[name]) for name in prompt_columns(row))


def _is_answer(value: object) -> bool:
    """Text, messages, or one message."""
    return is_side(value) or is_message(value)
