"""What prompts and completions begin and end with: separator, prefixes, ending, leading space."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ftlib.data.preparation.affixes import (
    ENDINGS,
    LAST_ENDING,
    LAST_SEPARATOR,
    SEPARATORS,
    ending_of,
    free_ending,
    free_separator,
    separator_of,
    shared_suffix,
    without,
)
from ftlib.data.preparation.check import Check, Context, Finding, Fix
from ftlib.data.preparation.table import Column, Edit
from ftlib.data.preparation.words import counted

__all__ = ["COMPLETION_ENDING", "COMPLETION_PREFIX", "LEADING_SPACE", "PROMPT_PREFIX", "PROMPT_SEPARATOR"]

_LONG_AFFIX = 10
_LONG_PROMPT_PREFIX = 12
_LONG_COMPLETION_PREFIX = 5


def _prompt_separator(context: Context) -> Iterator[Finding]:
    if context.task == "open-ended":
        return
    survey = context.table.survey("prompt")
    present = separator_of(survey)
    if present is not None:
        yield _present(context, "prompt", present, "separator")
        return
    shared = shared_suffix(survey, (*SEPARATORS, LAST_SEPARATOR))
    yield _absent("prompt", free_separator(survey), shared, "separator", survey.rows)


def _completion_ending(context: Context) -> Iterator[Finding]:
    asked = context.settings.ending
    if context.task != "conditional":
        if asked is not None:
            yield Finding(
                f"{context.task} data get no ending: {asked!r} is not used",
                data={"unused": asked},
                doubt=True,
            )
        return
    survey = context.table.survey("completion")
    present = ending_of(survey, None if asked == "eos" else asked)
    if present is not None:
        yield _present(context, "completion", present, "ending")
        return
    if asked == "eos":
        yield Finding(
            "completions have no ending; they rely on the end-of-sequence token",
            count=survey.rows,
            data={"eos": True},
        )
        return
    shared = shared_suffix(survey, (*ENDINGS, LAST_ENDING))
    yield _absent("completion", asked or free_ending(survey), shared, "ending", survey.rows)


def _present(context: Context, column: Column, affix: str, name: str) -> Finding:
    """All texts end in `affix`: said, with what makes it a poor choice."""
    data: dict[str, Any] = {"present": affix}
    notes = ""
    if len(affix) > _LONG_AFFIX:
        data["long"] = True
        notes += "; it is long"
    inside = [
        row.number
        for row in context.table.rows()
        if affix in without(row.prompt if column == "prompt" else row.completion, affix)
    ]
    if inside:
        data["repeated_in_rows"] = context.labels(inside)
        notes += f"; in {counted(len(inside), 'row')} it occurs earlier too"
    return Finding(
        f"all {column}s end in the {name} {affix!r}{notes}",
        rows=inside,
        count=len(inside),
        data=data,
        doubt=bool(notes),
        known={name: affix},
    )


def _absent(column: Column, affix: str, shared: str, name: str, rows: int) -> Finding:
    data: dict[str, Any] = {"append": affix}
    if shared:
        data["doubtful"] = shared
    doubt = f"; that all end in {shared!r} is taken for chance" if shared else ""

    def appended(text: str) -> str:
        return text if text.endswith(affix) else text + affix

    return Finding(
        f"{column}s have no common {name}{doubt}",
        count=rows,
        data=data,
        doubt=bool(shared),
        fix=Fix(
            "on",
            f"Append {affix!r} to all {column}s",
            {"append": affix},
            edits=(Edit(f"{column}_{name}", column, appended),),
            known={name: affix},
        ),
    )


def _prompt_prefix(context: Context) -> Iterator[Finding]:
    survey = context.table.survey("prompt")
    prefix = survey.prefix if survey.rows > 1 else ""
    if not prefix:
        return
    data: dict[str, Any] = {"prefix": prefix}
    said = f"all prompts begin with {prefix!r}"
    if len(prefix) <= _LONG_PROMPT_PREFIX:
        yield Finding(said, count=survey.rows, data=data)
        return
    # What is left must be more than the separator.
    if any(not without(row.prompt, context.separator)[len(prefix) :].strip() for row in context.table.rows()):
        yield Finding(
            f"{said}; it stays, because a prompt would become blank",
            count=survey.rows,
            data={**data, "withheld": True},
            doubt=True,
        )
        return
    counter = context.settings.counter
    yield Finding(
        said,
        count=survey.rows,
        data=data,
        fix=Fix(
            "off" if counter is not None and counter.is_chat else "on",
            f"Remove {prefix!r} from all prompts",
            {"remove": prefix},
            edits=(Edit("prompt_prefix", "prompt", lambda text: text.removeprefix(prefix)),),
            known={"removed_prefix": prefix},
        ),
    )


def _completion_prefix(context: Context) -> Iterator[Finding]:
    survey = context.table.survey("completion")
    prefix = survey.prefix if survey.rows > 1 else ""
    if len(prefix) < _LONG_COMPLETION_PREFIX:
        return
    space = " " if prefix.startswith(" ") else ""

    def removed(text: str) -> str:
        rest = text.removeprefix(prefix)
        return rest if rest.startswith(" ") else space + rest

    said = f"all completions begin with {prefix!r}"
    # What is left must be more than the ending.
    ending = ending_of(survey) if context.task == "conditional" else None
    if any(not without(removed(row.completion), ending).strip() for row in context.table.rows()):
        yield Finding(
            f"{said}; it stays, because a completion would become blank",
            count=survey.rows,
            data={"prefix": prefix, "withheld": True},
            doubt=True,
        )
        return
    yield Finding(
        said,
        count=survey.rows,
        data={"prefix": prefix},
        fix=Fix(
            "on",
            f"Remove {prefix!r} from all completions",
            {"remove": prefix, "keep": space},
            edits=(Edit("completion_prefix", "completion", removed),),
        ),
    )


def _leading_space(context: Context) -> Iterator[Finding]:
    survey = context.table.survey("completion")
    without_space = survey.rows - survey.spaced
    if not without_space:
        return
    counter = context.settings.counter
    yield Finding(
        f"{counted(without_space, 'completion')} without a space at the start",
        count=without_space,
        data={"prepend": " "},
        fix=Fix(
            "off" if counter is not None and counter.adds_space else "on",
            "Start all completions with a space",
            {"prepend": " "},
            edits=(Edit("leading_space", "completion", _spaced),),
        ),
    )


def _spaced(text: str) -> str:
    return text if text.startswith(" ") else " " + text


PROMPT_SEPARATOR = Check(
    "prompt_separator",
    "not open-ended, and prompts end in no common separator",
    _prompt_separator,
    "append the first candidate that occurs in no prompt",
    "on",
)
PROMPT_PREFIX = Check(
    "prompt_prefix",
    "all prompts begin alike",
    _prompt_prefix,
    "remove it if longer than 12 characters; off for chat models; withheld if a prompt would become blank",
    "on",
)
COMPLETION_PREFIX = Check(
    "completion_prefix",
    "all completions begin with the same 5 characters or more",
    _completion_prefix,
    "remove it, keeping one leading space; withheld if a completion would become blank",
    "on",
)
COMPLETION_ENDING = Check(
    "completion_ending",
    "conditional, and completions have no common ending",
    _completion_ending,
    "append the first candidate that occurs in no completion",
    "on",
)
LEADING_SPACE = Check(
    "leading_space",
    "a completion does not start with a space",
    _leading_space,
    "add it where absent; off when the tokenizer adds its own",
    "on",
)
