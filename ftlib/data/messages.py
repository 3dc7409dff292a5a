"""Chat messages in one shape: canonical roles, text content, one name per meaning."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ftlib.data.problems import describe
from ftlib.errors import DataError

__all__ = ["ROLES", "canonical_messages", "dicts_of", "is_message_list", "restored"]

ROLES: Mapping[str, str] = {
    spelling: role
    for role, spellings in {
        "system": ("system", "developer"),
        "user": ("user", "human", "prompter", "input", "query", "question"),
        "assistant": (
            "assistant",
            "gpt",
            "chatgpt",
            "bot",
            "model",
            "output",
            "response",
            "ai",
            "bing",
            "bard",
        ),
        "tool": (
            "tool",
            "ipython",
            "observation",
            "observations",
            "function",
            "function_response",
            "tool_response",
        ),
    }.items()
    for spelling in spellings
}
_KEPT = ("role", "content", "weight", "tool_calls", "tool_call_id", "name", "reasoning")
_REASONING = ("reasoning", "reasoning_content", "thinking")
_WEIGHTS = ("weight", "loss_weight", "loss", "train")


def is_message_list(value: object) -> bool:
    """A list of dicts that each have a role."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(isinstance(message, Mapping) and "role" in message for message in value)
    )


def canonical_messages(
    messages: Sequence[Mapping[str, Any]], column: str, roles: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Messages as they are stored: `role`, `content` and, where given, the other kept keys.

    `tool_calls` become JSON text, since their arguments differ in type from row to row; unknown keys
    are kept together as JSON text under `extra`. Null keys are absent keys.

    Args:
        messages: dicts with a role.
        column: their column, for errors.
        roles: spelling -> canonical role.

    Raises:
        DataError: ``unknown_role``, or content that is neither text nor text parts.
    """
    return [_canonical(message, f"{column}[{k}]", roles) for k, message in enumerate(messages)]


def restored(stored: Mapping[str, Any], column: str) -> dict[str, Any]:
    """A stored message as templates read it: no null keys, JSON text parsed, unknown keys put back.

    Raises:
        DataError: a message without a role, or JSON text that is none.
    """
    message = {key: value for key, value in stored.items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise DataError(f"expected a message with a role, got {describe(stored)}.", column=column)
    message |= _object_of(message.pop("extra", None))
    if "tool_calls" in message:
        message["tool_calls"] = dicts_of(message["tool_calls"], f"{column}.tool_calls")
    return message


def dicts_of(value: Any, column: str) -> list[dict[str, Any]]:
    """A list of objects, given as such or as JSON text; null and nothing are the empty list.

    Raises:
        DataError: anything else.
    """
    parsed = value
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            parsed = value
    if not parsed and not isinstance(parsed, (bool, int, float)):
        return []
    if not isinstance(parsed, list) or not all(isinstance(item, dict) for item in parsed):
        raise DataError(
            f"expected a list of objects, got {describe(value)}.", column=column, excerpt=describe(value)
        )
    return parsed


def _object_of(value: Any) -> dict[str, Any]:
    """The unknown keys kept in `extra`; something else of that name is an unknown key itself."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        parsed = value
    if value is None or isinstance(parsed, dict):
        return parsed or {}
    return {"extra": value}


def _canonical(message: Mapping[str, Any], column: str, roles: Mapping[str, str]) -> dict[str, Any]:
    given = {key: value for key, value in message.items() if value is not None}
    given |= _object_of(given.pop("extra", None))  # canonical once, canonical twice: the same
    kept: dict[str, Any] = {"role": _role(given.pop("role", None), column, roles)}
    calls = dicts_of(given.pop("tool_calls", None), f"{column}.tool_calls")
    kept["content"] = _content(given.pop("content", None), column, has_calls=bool(calls))
    weight = _weight(given, column)
    if weight is not None:
        kept["weight"] = weight
    if calls:
        kept["tool_calls"] = json.dumps(calls, ensure_ascii=False)
    reasoning = [given.pop(key) for key in _REASONING if key in given]
    if reasoning:
        kept["reasoning"] = _text(reasoning[0], f"{column}.reasoning")
    for key in ("tool_call_id", "name"):
        if key in given:
            kept[key] = _text(given.pop(key), f"{column}.{key}")
    if given:
        kept["extra"] = json.dumps(given, ensure_ascii=False, sort_keys=True, default=str)
    return kept


def _role(role: Any, column: str, roles: Mapping[str, str]) -> str:
    known = roles.get(role) if isinstance(role, str) else None
    if known is None:
        raise DataError(
            f"expected a role like system, user, assistant or tool, got {describe(role)}. "
            f"Map it: roles={{{role!r:.40}: 'assistant'}}.",
            code="unknown_role",
            column=f"{column}.role",
            excerpt=describe(role),
        )
    return known


def _content(content: Any, column: str, *, has_calls: bool) -> str:
    if content is None and has_calls:
        return ""
    if isinstance(content, Sequence) and not isinstance(content, str):
        if not all(
            isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("weight") is None
            for part in content
        ):
            raise DataError(
                f"expected text or text parts without weights, got {describe(content)}.",
                column=f"{column}.content",
                excerpt=describe(content),
            )
        content = "".join(part["text"] for part in content)
    text = _text(content, f"{column}.content")
    if not text.strip() and not has_calls and not column.startswith("prompt"):
        raise DataError(
            f"expected non-empty text, got {text!r}. Remove the row or fill it in.",
            column=f"{column}.content",
            excerpt=text,
        )
    return text


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"expected text, got {describe(value)}.", column=column, excerpt=describe(value))
    return value


def _weight(given: dict[str, Any], column: str) -> float | None:
    """The loss weight under any of its names, taken out of `given`."""
    found = {name: given.pop(name) for name in (*_WEIGHTS, "masked") if name in given}
    if not found:
        return None
    name, value = next(iter(found.items()))
    try:
        weight = float(not value) if name == "masked" else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if len(found) > 1 or not 0.0 <= weight < math.inf:
        raise DataError(f"expected one finite weight >= 0, got {describe(found)}.", column=f"{column}.{name}")
    return weight
