"""Conversations: message lists under any of their usual columns, in any of their dialects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ftlib.data import cells
from ftlib.data.formats.rule import Converted, FormatOptions, Found, Rule, Slot, compares, optional, slotted
from ftlib.data.formats.rule import turn as turn_of
from ftlib.data.messages import is_message_list, role_of
from ftlib.errors import DataError

__all__ = ["MESSAGES", "QUESTIONS", "is_chat", "turns_in"]

_COLUMNS = ("messages", "conversations", "conversation", "conversation_json")
_EXCHANGE = ("human", "assistant")  # keys of one exchange, in lists of exchanges


def is_chat(value: object) -> bool:
    """A conversation in any dialect."""
    return _listed(value) is not None


def turns_in(found: Found, options: FormatOptions) -> list[dict[str, Any]]:
    """The messages of the slot `messages`, after the text of the slot `system`.

    Raises:
        DataError: no conversation, a bad message in it, or two system texts.
    """
    listed = _listed(found["messages"])
    value = found["messages"] if listed is None else listed
    messages = cells.messages(value, found.columns["messages"], options.roles)
    system = found.text_or_none("system")
    if system is None:
        return messages
    if messages[0]["role"] != "system":
        return [turn_of("system", system), *messages]
    if messages[0]["content"] != system:
        raise DataError(
            "expected one system text, got one in the messages and another in a column. Remove one.",
            column=found.columns["system"],
            excerpt=system,
        )
    return messages


def _listed(value: Any) -> Sequence[Mapping[str, Any]] | None:
    """A list of messages made of any dialect; `None` for something else."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, Mapping):
        value = value.get("messages")
    if is_message_list(value):
        found: Sequence[Mapping[str, Any]] = value
        return found
    if not isinstance(value, list) or not value or not all(map(_is_exchange, value)):
        return None
    return [
        turn_of("user" if key == "human" else key, exchange[key])
        for exchange in value
        for key in _EXCHANGE
        if exchange.get(key) is not None
    ]


def _is_exchange(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and set(value) <= set(_EXCHANGE)


def _asks(value: object) -> bool:
    """The last message is a user's: there is something to answer."""
    listed = _listed(value)
    return listed is not None and role_of(listed[-1]) == "user"


def _answers(value: object) -> bool:
    """Messages that do not only ask: they end in an answer, or have one on the way."""
    listed = _listed(value)
    return listed is not None and (role_of(listed[-1]) != "user" or len(listed) > 2)


def _question(found: Found, options: FormatOptions) -> Converted:
    messages = turns_in(found, options)
    if messages[-1]["role"] == "assistant":
        raise DataError(
            "expected messages that end in a question, as in the other rows, got an answer.",
            column=found.columns["messages"],
        )
    return cells.with_tools(found.row, {"prompt": messages})


def _conversation(found: Found, options: FormatOptions) -> Converted:
    messages = turns_in(found, options)
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(
            "expected an assistant message to learn, got none. Remove the row or add the answer.",
            column=found.columns["messages"],
        )
    return cells.with_tools(found.row, {"messages": messages})


def _chat(name: str, slot: Slot, convert: Any, column: str, keys: str) -> Rule:
    return slotted(
        name,
        {"messages": slot, "system": optional("system", "system_prompt")},
        convert,
        keys=keys,
        known_as="ChatML, ShareGPT, oumi",
        columns=(column,),
        number=13,
        unless=compares,
    )


QUESTIONS = _chat(
    "messages_prompt",
    Slot(_COLUMNS, _asks),
    _question,
    "prompt",
    "messages that end in a question, in every row",
)
MESSAGES = _chat(
    "messages",
    Slot(_COLUMNS, _answers),
    _conversation,
    "messages",
    "messages | conversations | conversation | conversation_json",
)
