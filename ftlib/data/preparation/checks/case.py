"""Columns in capitals: lower-case all but the separator and the ending."""

from __future__ import annotations

from collections.abc import Iterator

from ftlib.data.preparation.affixes import LAST_ENDING, ending_of, separator_of
from ftlib.data.preparation.check import Check, Context, Finding, Fix
from ftlib.data.preparation.survey import Survey
from ftlib.data.preparation.table import Column, Edit

__all__ = ["COMPLETION_CASE", "PROMPT_CASE"]


def _prompt_case(context: Context) -> Iterator[Finding]:
    survey = context.table.survey("prompt")
    if survey.mostly_upper():
        yield from _finding("prompt", survey, separator_of(survey), default_on=True)


def _completion_case(context: Context) -> Iterator[Finding]:
    survey = context.table.survey("completion")
    ending = ending_of(survey, _asked_ending(context)) if context.task == "conditional" else None
    if not survey.mostly_upper():
        return
    # The capitals and the word of an ending of ours are no reason to change what stands before it.
    ours = ending if ending in (" END", LAST_ENDING) else ""
    are_labels = context.task == "classification"
    default_on = survey.mostly_upper(ours) and not are_labels and not survey.median_is_one_word(ours)
    yield from _finding("completion", survey, ending, default_on=default_on)


def _asked_ending(context: Context) -> str | None:
    return None if context.settings.ending == "eos" else context.settings.ending


def _finding(column: Column, survey: Survey, affix: str | None, *, default_on: bool) -> Iterator[Finding]:
    # An affix that starts with a letter is a piece of a word that all texts happen to end in.
    spared = "" if affix is None or affix[0].isalnum() else affix
    if not survey.upper_but(spared):
        return

    def lowered(text: str) -> str:
        return text[: len(text) - len(spared)].lower() + spared if text.endswith(spared) else text.lower()

    check = f"{column}_case"
    yield Finding(
        f"{column}s are mostly in capitals",
        count=survey.rows,
        data={"upper": survey.upper, "lower": survey.lower},
        fix=Fix(
            "on" if default_on else "off",
            f"Lower-case the {column}s",
            {"spared": spared} if spared else {},
            edits=(Edit(check, column, lowered),),
        ),
    )


PROMPT_CASE = Check(
    "prompt_case",
    "2 · upper > lower letters in the prompts",
    _prompt_case,
    "lower-case all but the separator",
    "on",
)
COMPLETION_CASE = Check(
    "completion_case",
    "2 · upper > lower letters in the completions",
    _completion_case,
    "lower-case all but the ending; off for labels, for completions of median length one word, and where "
    "only the ending is in capitals",
    "on",
)
