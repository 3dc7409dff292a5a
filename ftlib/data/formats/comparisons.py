"""Which of several answers is better: pairs, judged pairs, ranked answers.

The spellings of pairs and ranked answers are told in `ftlib.data.spellings`, what becomes of them in
`ftlib.data.preferences`.
"""

from __future__ import annotations

from collections.abc import Callable

from ftlib.data.formats.rule import Converted, FormatOptions, Found, Rule, Slot, slotted, text
from ftlib.data.preferences import canonical_pair, canonical_ranked
from ftlib.data.problems import describe
from ftlib.data.segments import Row
from ftlib.data.spellings import fits_pair, fits_ranked, pair_columns, ranked_columns
from ftlib.errors import DataError

__all__ = [
    "ARGILLA",
    "DIALOGUES",
    "JUDGED",
    "OPENAI",
    "PREFERENCE",
    "RANKED",
    "REJECTED_ANSWER",
    "STACK_EXCHANGE",
    "TURNS",
]

_PLAIN = ("chosen", "accepted", "response_chosen")


def _pairs(
    name: str,
    number: int,
    *,
    chosen: tuple[str, ...],
    keys: str,
    known_as: str,
    also: Callable[[Row], bool] = lambda _: True,
) -> Rule:
    """A rule for pairs whose better side stands in one of the columns `chosen`."""
    return Rule(
        name,
        keys,
        known_as,
        ("chosen", "rejected"),
        ("chosen", "rejected"),
        lambda row: fits_pair(row) and pair_columns(row).chosen in chosen and also(row),
        lambda row, options: canonical_pair(row, options.roles),
        lambda row: pair_columns(row).names,
        ("prompt", "chosen", "rejected", "margin", *chosen),
        number,
    )


def _asks(row: Row) -> bool:
    return bool(pair_columns(row).prompt)


def _as_text(row: Row) -> bool:
    return not _asks(row) and isinstance(row[pair_columns(row).chosen], str)


OPENAI = _pairs(
    "openai_preference",
    3,
    chosen=("preferred_output", "preferred_completion"),
    keys="input.messages + preferred_output + non_preferred_output",
    known_as="OpenAI preference",
)
PREFERENCE = _pairs(
    "preference",
    4,
    chosen=_PLAIN,
    also=_asks,
    keys="chosen + rejected + (prompt | instruction | question | input)",
    known_as="TRL, LLaMA-Factory",
)
TURNS = _pairs(
    "preference_turns",
    5,
    chosen=_PLAIN,
    also=lambda row: not _asks(row) and not _as_text(row),
    keys="chosen + rejected, lists",
    known_as="UltraFeedback",
)
DIALOGUES = _pairs(
    "preference_dialogues",
    6,
    chosen=_PLAIN,
    also=_as_text,
    keys="chosen + rejected, text",
    known_as="HH-RLHF",
)
REJECTED_ANSWER = _pairs(
    "rejected_answer",
    7,
    chosen=("messages",),
    keys="messages + (rejected_response | rejected_messages | rejected_message)",
    known_as="ms-swift, OpenPipe",
)
ARGILLA = _pairs(
    "argilla",
    8,
    chosen=("chosen_response",),
    keys="chosen_response + rejected_response + prompt",
    known_as="Argilla",
)
STACK_EXCHANGE = _pairs(
    "stack_exchange",
    9,
    chosen=("response_j",),
    keys="question + response_j + response_k",
    known_as="StackExchange",
)


def _judged(found: Found, options: FormatOptions) -> Converted:
    label = found["label"]
    if label not in (0, 1):
        raise DataError(
            f"expected labels 1 (A is better) or 0 (B is), got {describe(label)}.",
            column="labels",
            excerpt=describe(label),
        )
    first, second = ("a", "b") if label == 1 else ("b", "a")
    pair = {
        "prompt": found.text("prompt", empty=True),
        "chosen": found.text(first),
        "rejected": found.text(second),
    }
    return canonical_pair(pair, options.roles)


JUDGED = slotted(
    "judged",
    {
        "prompt": text("history"),
        "a": text("human_ref_A"),
        "b": text("human_ref_B"),
        "label": Slot(("labels",), lambda value: value in (0, 1)),
    },
    _judged,
    keys="history + human_ref_A + human_ref_B + labels",
    known_as="SHP",
    columns=("prompt", "chosen", "rejected"),
    number=9,
)
RANKED = Rule(
    "ranked",
    "prompt + (answers | responses) with ranks or scores",
    "Nectar",
    ("prompt", "answers"),
    ("prompt", "answers"),
    fits_ranked,
    lambda row, options: canonical_ranked(row, options.roles),
    lambda row: ranked_columns(row).names,
    ("prompt", "answers", "ranks", "scores", "responses"),
    10,
    ("pairs",),
)
