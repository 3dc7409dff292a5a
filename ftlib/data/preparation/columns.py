"""Which columns of a source are the prompt and the completion, and what form its rows have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

from ftlib.data.formats import RULES, FormatOptions, Rule
from ftlib.data.formats.chats import MESSAGES, QUESTIONS
from ftlib.data.formats.completions import PROMPT_COMPLETION
from ftlib.data.formats.judgements import KTO, KTO_MESSAGES
from ftlib.data.messages import is_message_list
from ftlib.data.problems import describe
from ftlib.data.reading import Facts
from ftlib.errors import DataError

__all__ = ["COLUMNS", "Form", "form_of", "missing", "renamed", "role_of", "words"]

Form = Literal["pairs", "messages", "preference"]
COLUMNS = ("prompt", "completion")
_OTHER_NAMES = {
    "prompt": ("instruction", "question", "input", "query", "text", "context", "user", "source"),
    "completion": (
        "response", "answer", "output", "label", "target", "generation", "reply", "assistant", "class", "text"
    ),
}  # fmt: skip


_MESSAGES = (MESSAGES, QUESTIONS, KTO_MESSAGES, PROMPT_COMPLETION)
_PREFERENCES = (KTO, *(rule for rule in RULES if {"chosen", "answers"} & set(rule.columns)))


def role_of(name: str) -> str | None:
    """`prompt` or `completion` if `name` is that but for case and outer blanks.

    Example:
        >>> role_of(" Prompt"), role_of("id")
        ('prompt', None)
    """
    plain = name.strip().lower()
    return plain if plain in COLUMNS else None


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with the columns that the user mapped under canonical names; what stood there is kept aside."""
    if not columns:
        return dict(row)
    mapped = {canonical: row[given] for canonical, given in columns.items() if given in row}
    rest = {
        (f"extra_{name}" if name in mapped else name): value
        for name, value in row.items()
        if name not in columns.values()
    }
    return {**mapped, **rest}


def form_of(rows: Sequence[Mapping[str, Any]]) -> tuple[Form, Rule | None]:
    """What the rows are: pairs of text, or else messages or preferences with the rule that reads them."""
    named = {role_of(name) for row in rows for name in row}
    conversations = any(is_message_list(row.get(column)) for row in rows for column in COLUMNS)
    if set(COLUMNS) <= named and not conversations and not all(map(_is_judged, rows)):
        return "pairs", None
    fits = {rule.name: sum(map(rule.fits, rows)) for rule in RULES}
    best = max(RULES, key=lambda rule: fits[rule.name])  # of equals the first in the table
    if 2 * fits[best.name] > len(rows):
        if best in _PREFERENCES:
            return "preference", best
        if best in _MESSAGES:
            return "messages", best
    return "pairs", None


def words(row: dict[str, Any], rule: Rule) -> str:
    """All that is said in a row of messages or preferences.

    Raises:
        DataError: what is wrong with the row.
    """
    found: list[str] = []

    def collect(value: Any) -> None:
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, Mapping):
            collect(value.get("content"))
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)

    made = rule.convert(row, FormatOptions())
    for record in made if isinstance(made, list) else [made]:
        for name, value in record.items() if isinstance(record, dict) else ():
            if name != "tools":
                collect(value)
    return "\n".join(found)


def missing(
    columns: Sequence[str], found: Sequence[str], facts: Facts, first: Mapping[str, Any]
) -> DataError:
    """The error of absent columns, with the mapping that is likely meant."""
    hints = []
    taken: set[str] = set()
    for column in columns:
        likely = _likely(column, [name for name in found if name not in taken])
        if likely is not None:
            taken.add(likely)
            hints.append(f"{column}={likely}")
    message = f"expected the columns prompt and completion, missing {list(columns)}, found {list(found)}."
    if hints:
        arguments = " ".join(f"--map {hint}" for hint in hints)
        mapping = ", ".join(f"{c!r}: {f!r}" for c, f in (hint.split("=", 1) for hint in hints))
        message += f" Name what is meant: {arguments} (in Python columns={{{mapping}}})."
    if columns == ["prompt"]:
        message += " If the data are open-ended, without prompts: --task open-ended."
    if facts.header is not None and len(columns) == len(COLUMNS):
        message += (
            " If the file has no header and its first row is data: --no-header. "
            f"First row: {describe(list(facts.header))}."
        )
    return DataError(
        message,
        code="missing_column",
        file=facts.file,
        column=columns[0],
        excerpt=json.dumps(dict(first), ensure_ascii=False, default=str),
    )


def _likely(column: str, found: Sequence[str]) -> str | None:
    plain = {name.strip().lower(): name for name in reversed(found)}
    for other in _OTHER_NAMES[column]:
        if other in plain:
            return plain[other]
    close = get_close_matches(column, list(plain), n=1)
    return plain[close[0]] if close else None


def _is_judged(row: Mapping[str, Any]) -> bool:
    """A completion with a truth value; the words `yes` or `1` may stand in a table for other reasons."""
    return any(isinstance(row.get(name), bool) for name in ("label", "kto_tag")) and KTO.fits(row)
