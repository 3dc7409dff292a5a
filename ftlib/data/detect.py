"""Which format rows are in: a table of rules, tried in order.

A rule holds for data when it fits every row looked at; null counts as absent. Where none does, but one
fits most rows, that one is the format and the other rows are reported as bad. A new format is a row in
`RULES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from ftlib.data.messages import canonical_messages, dicts_of, is_message_list
from ftlib.data.problems import describe
from ftlib.errors import ConfigError, DataError

__all__ = ["RULES", "Rule", "detect", "rule_named"]

Roles = Mapping[str, str]


@final
@dataclass(frozen=True)
class Rule:
    """One record format.

    Args:
        name: what `format=` calls it.
        columns: its canonical columns, in order.
        fits: whether a row has these keys with usable types.
        canonical: a row to its canonical columns; raises DataError for a row that does not fit.
    """

    name: str
    columns: tuple[str, ...]
    fits: Callable[[Mapping[str, Any]], bool]
    canonical: Callable[[Mapping[str, Any], Roles], dict[str, Any]]


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


def _has(row: Mapping[str, Any], *columns: str) -> bool:
    return all(row.get(column) is not None for column in columns)


def _side(row: Mapping[str, Any], column: str) -> bool:
    return isinstance(row.get(column), str) or is_message_list(row.get(column))


def _asks(row: Mapping[str, Any]) -> bool:
    """The last message is a user's: there is something to answer."""
    messages: Any = row.get("messages")
    return is_message_list(messages) and messages[-1]["role"] in ("user", "human")


def _answers(row: Mapping[str, Any]) -> bool:
    """Messages that do not only ask: they end in an answer, or have one on the way."""
    messages: Any = row.get("messages")
    return is_message_list(messages) and (not _asks(row) or len(messages) > 2)


def _pair(row: Mapping[str, Any]) -> bool:
    return _side(row, "prompt") and _side(row, "completion")


def _prompt_alone(row: Mapping[str, Any]) -> bool:
    return _side(row, "prompt") and not _has(row, "completion") and not _has(row, "messages")


def _text_alone(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("text"), str) and not any(
        _has(row, key) for key in ("prompt", "completion", "messages")
    )


def _text(row: Mapping[str, Any], column: str, *, empty: bool = False) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise DataError(
            f"expected text, got {describe(value)}. Remove the row or fill it in.",
            column=column,
            excerpt=describe(value),
        )
    if not empty and not value.strip():
        raise DataError(
            f"expected non-empty text, got {describe(value)}. Remove the row or fill it in.",
            column=column,
            excerpt=value,
        )
    return value


def _messages(row: Mapping[str, Any], column: str, roles: Roles) -> list[dict[str, Any]]:
    value = row.get(column)
    if value is None or not is_message_list(value):
        raise DataError(
            f"expected a list of messages with role and content, got {describe(value)}.",
            column=column,
            excerpt=describe(value),
        )
    return canonical_messages(value, column, roles)


def _with_tools(row: Mapping[str, Any], canonical: dict[str, Any]) -> dict[str, Any]:
    tools = dicts_of(row.get("tools"), "tools")
    return {**canonical, "tools": json.dumps(tools, ensure_ascii=False)} if tools else canonical


def _canonical_messages(row: Mapping[str, Any], roles: Roles) -> dict[str, Any]:
    messages = _messages(row, "messages", roles)
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(
            "expected an assistant message to learn, got none. Remove the row or add the answer.",
            column="messages",
        )
    return _with_tools(row, {"messages": messages})


def _canonical_question(row: Mapping[str, Any], roles: Roles) -> dict[str, Any]:
    messages = _messages(row, "messages", roles)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            "expected messages that end in a question, as in the other rows, got an answer.",
            column="messages",
        )
    return _with_tools(row, {"prompt": messages})


def _canonical_pair(row: Mapping[str, Any], roles: Roles) -> dict[str, Any]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if is_message_list(prompt) or is_message_list(completion):
        if isinstance(prompt, str) or isinstance(completion, str):
            raise DataError(
                "expected prompt and completion both as text or both as messages, got one of each.",
                column="completion",
            )
        pair = {"prompt": _messages(row, "prompt", roles), "completion": _messages(row, "completion", roles)}
        return _with_tools(row, pair)
    return {"prompt": _text(row, "prompt", empty=True), "completion": _text(row, "completion")}


def _canonical_prompt(row: Mapping[str, Any], roles: Roles) -> dict[str, Any]:
    if _has(row, "completion"):
        raise DataError(
            "expected a prompt alone, as in the other rows, got a completion too.", column="completion"
        )
    if is_message_list(row.get("prompt")):
        return _with_tools(row, {"prompt": _messages(row, "prompt", roles)})
    return {"prompt": _text(row, "prompt")}


def _canonical_text(row: Mapping[str, Any], _: Roles) -> dict[str, Any]:
    return {"text": _text(row, "text")}


RULES: tuple[Rule, ...] = (
    Rule("messages_prompt", ("messages",), _asks, _canonical_question),
    Rule("messages", ("messages",), _answers, _canonical_messages),
    Rule("prompt_completion", ("prompt", "completion"), _pair, _canonical_pair),
    Rule("prompt", ("prompt",), _prompt_alone, _canonical_prompt),
    Rule("text", ("text",), _text_alone, _canonical_text),
)
