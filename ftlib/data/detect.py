"""Which format rows are in: a table of rules, tried in order.

A rule holds for data when it fits every row looked at; null counts as absent. Where none does, but one
fits most rows, that one is the format and the other rows are reported as bad. A new format is a row in
`RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from ftlib.data import cells
from ftlib.data.cells import Roles, has, is_side, with_tools
from ftlib.data.messages import is_message_list
from ftlib.data.preferences import canonical_pair, canonical_ranked
from ftlib.data.spellings import (
    fits_pair,
    fits_ranked,
    is_pair,
    is_ranked,
    pair_columns,
    ranked_columns,
)
from ftlib.errors import ConfigError, DataError

__all__ = ["RULES", "Rule", "detect", "rule_named"]


@final
@dataclass(frozen=True)
class Rule:
    """One record format.

    Args:
        name: what `format=` calls it.
        columns: its canonical columns, in order.
        fits: whether a row has these keys with usable types.
        canonical: a row to its canonical columns; raises DataError for a row that does not fit.
        spelled: the columns that `canonical` reads of a row, where these have several spellings.
    """

    name: str
    columns: tuple[str, ...]
    fits: Callable[[Mapping[str, Any]], bool]
    canonical: Callable[[Mapping[str, Any], Roles], dict[str, Any]]
    spelled: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None

    def reads(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The columns of `row` that become canonical ones."""
        return self.columns if self.spelled is None else self.spelled(row)


def detect(rows: Sequence[Mapping[str, Any]], *, file: str) -> Rule:
    """The rule that fits every one of `rows`, or failing that most of them.

    Raises:
        DataError: ``unknown_format`` with the keys found, or ``missing_column`` where only a
            completion is there.
    """
    counts = {rule.name: sum(map(rule.fits, rows)) for rule in RULES}
    best = max(RULES, key=lambda rule: counts[rule.name])  # of equals the first in the table
    if counts[best.name] * 2 > len(rows):
        return best
    keys = sorted(
        {str(key) for row in rows for key, value in row.items() if value is not None and key != "_source"}
    )
    if "completion" in keys and "prompt" not in keys:
        raise DataError(
            f"expected prompt beside completion, found {keys}. For open-ended text, map it: "
            'columns={"text": "completion"}.',
            code="missing_column",
            file=file,
            column="prompt",
        )
    expected = "; ".join(dict.fromkeys(" + ".join(rule.columns) for rule in RULES))
    raise DataError(
        f"expected one of the formats {expected}; found the keys {keys}. Nearest is {best.name!r}, fitting "
        f'{counts[best.name]} of {len(rows)} rows. Map columns: columns={{"prompt": …, "completion": …}}.',
        code="unknown_format",
        file=file,
    )


def rule_named(name: str) -> Rule:
    """The rule that `format=` names.

    Raises:
        ConfigError: no such rule.
    """
    for rule in RULES:
        if rule.name == name:
            return rule
    names = ["auto", "rows", *(rule.name for rule in RULES)]
    raise ConfigError(f"load_records: expected format as one of {names}, got {name!r}.")


def _asks(row: Mapping[str, Any]) -> bool:
    """The last message is a user's: there is something to answer."""
    messages: Any = row.get("messages")
    return is_message_list(messages) and messages[-1]["role"] in ("user", "human") and not _compares(row)


def _answers(row: Mapping[str, Any]) -> bool:
    """Messages that do not only ask: they end in an answer, or have one on the way."""
    messages: Any = row.get("messages")
    return is_message_list(messages) and (not _asks(row) or len(messages) > 2) and not _compares(row)


def _completes(row: Mapping[str, Any]) -> bool:
    return is_side(row.get("prompt")) and is_side(row.get("completion")) and not _compares(row)


def _prompt_alone(row: Mapping[str, Any]) -> bool:
    return is_side(row.get("prompt")) and not (
        has(row, "completion") or has(row, "messages") or _compares(row)
    )


def _text_alone(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("text"), str) and not (
        any(has(row, key) for key in ("prompt", "completion", "messages")) or _compares(row)
    )


def _compares(row: Mapping[str, Any]) -> bool:
    """A pair or ranked answers, a part of which may be missing: no other rule may take such a row."""
    return is_pair(row) or is_ranked(row)


def _canonical_messages(row: Mapping[str, Any], roles: Roles) -> dict[str, Any]:
    messages = cells.messages(row.get("messages"), "messages", roles)
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(
            "expected an assistant message to learn, got none. Remove the row or add the answer.",
            column="messages",
        )
    return with_tools(row, {"messages": messages})


def _canonical_question(row: Mapping[str, Any], roles: Roles) -> dict[str, Any]:
    messages = cells.messages(row.get("messages"), "messages", roles)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            "expected messages that end in a question, as in the other rows, got an answer.",
            column="messages",
        )
    return with_tools(row, {"prompt": messages})


def _canonical_completion(row: Mapping[str, Any], roles: Roles) -> dict[str, Any]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if is_message_list(prompt) or is_message_list(completion):
        if isinstance(prompt, str) or isinstance(completion, str):
            raise DataError(
                "expected prompt and completion both as text or both as messages, got one of each.",
                column="completion",
            )
        turns = {
            name: cells.messages(value, name, roles)
            for name, value in (("prompt", prompt), ("completion", completion))
        }
        return with_tools(row, turns)
    return {
        "prompt": cells.text(prompt, "prompt", empty=True),
        "completion": cells.text(completion, "completion"),
    }


def _canonical_prompt(row: Mapping[str, Any], roles: Roles) -> dict[str, Any]:
    prompt = row.get("prompt")
    if has(row, "completion"):
        raise DataError(
            "expected a prompt alone, as in the other rows, got a completion too.", column="completion"
        )
    if is_message_list(prompt):
        return with_tools(row, {"prompt": cells.messages(prompt, "prompt", roles)})
    return {"prompt": cells.text(prompt, "prompt")}


def _canonical_text(row: Mapping[str, Any], _: Roles) -> dict[str, Any]:
    return {"text": cells.text(row.get("text"), "text")}


RULES: tuple[Rule, ...] = (
    Rule(
        "preference", ("chosen", "rejected"), fits_pair, canonical_pair, lambda row: pair_columns(row).names
    ),
    Rule(
        "ranked", ("prompt", "answers"), fits_ranked, canonical_ranked, lambda row: ranked_columns(row).names
    ),
    Rule("messages_prompt", ("messages",), _asks, _canonical_question),
    Rule("messages", ("messages",), _answers, _canonical_messages),
    Rule("prompt_completion", ("prompt", "completion"), _completes, _canonical_completion),
    Rule("prompt", ("prompt",), _prompt_alone, _canonical_prompt),
    Rule("text", ("text",), _text_alone, _canonical_text),
)
