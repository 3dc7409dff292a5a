r"""Separators after prompts and endings after completions: which there are, and how one is recognised.

X is what all texts of a column end in. A separator, and an ending likewise, is the candidate that X ends
in, or else X itself where X is no accident.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from ftlib.data.preparation.survey import Survey

__all__ = [
    "ENDINGS",
    "LAST_ENDING",
    "LAST_SEPARATOR",
    "SEPARATORS",
    "ending_of",
    "free_ending",
    "free_separator",
    "separator_of",
    "shared_suffix",
    "without",
]

SEPARATORS = (" ->", *(f"\n\n{mark}\n\n" for mark in ("###", "===", "---", "===>", "--->")))
LAST_SEPARATOR = "\n\n### =>\n\n"
ENDINGS = ("\n", " END", "***", "+++", "&&&", "$$$", "@@@", "%%%")
LAST_ENDING = " [END]"


def shared_suffix(survey: Survey, candidates: Sequence[str]) -> str:
    """X: what all texts end in; of a single row only a candidate."""
    if survey.rows == 1:
        return _candidate(survey.suffix, candidates) or ""
    return survey.suffix


def separator_of(survey: Survey) -> str | None:
    """The separator that all prompts end in, or `None`."""
    shared = shared_suffix(survey, (*SEPARATORS, LAST_SEPARATOR))
    found = _candidate(shared, (*SEPARATORS, LAST_SEPARATOR))
    if found is not None:
        return found
    counts = "\n" in shared or (shared[:1].isspace() and _is_mark(shared[-1:]))
    return shared if shared and counts else None


def ending_of(survey: Survey, asked: str | None = None) -> str | None:
    """The ending of all completions, or `None`; where one is `asked` for, no other counts."""
    if asked is not None:
        return asked if survey.rows and survey.suffix.endswith(asked) else None
    shared = shared_suffix(survey, (*ENDINGS, LAST_ENDING))
    found = _candidate(shared, (*ENDINGS, LAST_ENDING))
    if found is not None:
        return found
    return shared if shared and not shared[-1].isalnum() else None


def free_separator(survey: Survey) -> str:
    """The first separator that occurs in no prompt; the arrow only where no prompt has several lines."""
    for candidate in SEPARATORS:
        if candidate not in survey.held and not (candidate == " ->" and survey.multiline):
            return candidate
    return LAST_SEPARATOR


def free_ending(survey: Survey) -> str:
    """The first ending that occurs in no completion."""
    return next((candidate for candidate in ENDINGS if candidate not in survey.held), LAST_ENDING)


def without(text: str, affix: str | None) -> str:
    """`text` without what it ends in."""
    return text.removesuffix(affix) if affix else text


def _candidate(shared: str, candidates: Sequence[str]) -> str | None:
    return next((candidate for candidate in candidates if shared.endswith(candidate)), None)


def _is_mark(char: str) -> bool:
    """Punctuation, or a symbol such as ``>`` and ``=``."""
    return char != "" and unicodedata.category(char)[0] in "PS"
