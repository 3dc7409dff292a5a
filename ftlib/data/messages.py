"""Chat messages in one shape: canonical roles, text content, one name per meaning.

Read are `role` and `content`, ShareGPT's `from` and `value`, and content as text, as text parts, or as
Anthropic's blocks, whose tool uses become `tool_calls`, tool results messages of their own, and thinking
`reasoning`.

Left out: images and sound, and parts of a content with weights of their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from ftlib.data.problems import describe
from ftlib.errors import DataError

__all__ = [
    "ROLES",
    "canonical_messages",
    "dicts_of",
    "is_message",
    "is_message_list",
    "restored",
    "role_of",
]

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
_CALLERS = ("function_call", "tool_call")  # roles of an assistant whose content is the call itself
_TWO_KEYS = frozenset({"role", "content"})
_REASONING = ("reasoning", "reasoning_content", "thinking")
_WEIGHTS = ("weight", "loss_weight", "loss", "train")


def is_message(value: object) -> bool:
    """One message: `role`, or `from` and `value`."""
    return isinstance(value, Mapping) and ("role" in value or ("from" in value and "value" in value))


def is_message_list(value: object) -> bool:
    """A list of messages, at least one."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and bool(value)
        and all(map(is_message, value))
    )


def role_of(message: Mapping[str, Any], roles: Mapping[str, str] = ROLES) -> str | None:
    """The canonical role of a message; `None` for one that is unknown.

    Example:
        >>> role_of({"from": "gpt", "value": "Hello"})
        'assistant'
    """
    role = message.get("role") if message.get("role") is not None else message.get("from")
    if not isinstance(role, str):
        return None
    return roles.get(role) or roles.get(role.strip().lower()) or ("assistant" if role in _CALLERS else None)


def canonical_messages(
    messages: Sequence[Mapping[str, Any]], column: str, roles: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Messages as they are stored: `role`, `content` and, where given, the other kept keys.

    `tool_calls` become JSON text, since their arguments differ in type from row to row; unknown keys
    are kept together as JSON text under `extra`. Null keys are absent keys.

    Args:
        messages: dicts with `role` and `content`, or with `from` and `value`.
        column: their column, for errors.
        roles: spelling -> canonical role.

    Raises:
        DataError: ``unknown_role``, or content that is neither text nor parts that are read.
    """
    return [
        made for k, message in enumerate(messages) for made in _canonical(message, f"{column}[{k}]", roles)
    ]


def restored(stored: Mapping[str, Any], column: str) -> dict[str, Any]:
    """A stored message as templates read it: no null keys, JSON text parsed, unknown keys put back, and
    `reasoning` under the two names that templates know.

    Raises:
        DataError: a message without a role, or JSON text that is none.
    """
    message = {key: value for key, value in stored.items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise DataError(f"expected a message with a role, got {describe(stored)}.", column=column)
    message |= _object_of(message.pop("extra", None))
    if "tool_calls" in message:
        message["tool_calls"] = dicts_of(message["tool_calls"], f"{column}.tool_calls")
    if "reasoning" in message:
        message |= dict.fromkeys(("reasoning_content", "thinking"), message["reasoning"])
    return message


def dicts_of(value: Any, column: str) -> list[dict[str, Any]]:
    """A list of objects, given as such or as JSON text; null and nothing are the empty list.

    Raises:
        DataError: anything else.
    """
    parsed = _parsed(value)
    if not parsed and not isinstance(parsed, (bool, int, float)):
        return []
    if not isinstance(parsed, list) or not all(isinstance(item, dict) for item in parsed):
        raise DataError(
            f"expected a list of objects, got {describe(value)}.", column=column, excerpt=describe(value)
        )
    return parsed


def _object_of(value: Any) -> dict[str, Any]:
    """The unknown keys kept in `extra`; something else of that name is an unknown key itself."""
    parsed = _parsed(value)
    if value is None or isinstance(parsed, dict):
        return parsed or {}
    return {"extra": value}


def _canonical(message: Mapping[str, Any], column: str, roles: Mapping[str, str]) -> list[dict[str, Any]]:
    """One message; several where its blocks hold tool results."""
    if message.keys() == _TWO_KEYS and isinstance(message["content"], str):  # most messages
        role = _role(message["role"], column, roles)
        if message["role"] not in _CALLERS:
            return [{"role": role, "content": _content(message["content"], column, has_calls=False)}]
    given = {key: value for key, value in message.items() if value is not None}
    given |= _object_of(given.pop("extra", None))  # canonical once, canonical twice: the same
    if "role" not in given and "value" in message:
        given = {"role": given.pop("from", None), "content": given.pop("value", None), **given}
    role = _role(given.get("role"), column, roles)
    is_call = given.pop("role") in _CALLERS and role == "assistant"
    content = _read(given.pop("content", None), f"{column}.content")
    calls = [*_calls(given.pop("tool_calls", None), f"{column}.tool_calls"), *content.calls]
    calls += _calls(given.pop("function_call", None), f"{column}.function_call")
    if is_call:
        calls, content = _calls(content.text, f"{column}.content"), _Content("")
    results = [{"role": "tool", **result} for result in content.results]
    if results and content.text is None:
        return results
    kept: dict[str, Any] = {"role": role}
    kept["content"] = _content(content.text, column, has_calls=bool(calls))
    weight = _weight(given, column)
    if weight is not None:
        kept["weight"] = weight
    if calls:
        kept["tool_calls"] = json.dumps(calls, ensure_ascii=False)
    reasoning = [given.pop(key) for key in _REASONING if key in given] or content.reasoning
    if reasoning:
        kept["reasoning"] = _text(reasoning[0], f"{column}.reasoning")
    for key in ("tool_call_id", "name"):
        if key in given:
            kept[key] = _text(given.pop(key), f"{column}.{key}")
    if given:
        kept["extra"] = json.dumps(given, ensure_ascii=False, sort_keys=True, default=str)
    return [*results, kept]


def _role(role: Any, column: str, roles: Mapping[str, str]) -> str:
    known = role_of({"role": role}, roles)
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
    text = _text(content, f"{column}.content")
    if not text.strip() and not has_calls and not column.startswith("prompt"):
        raise DataError(
            f"expected non-empty text, got {text!r}. Remove the row or fill it in.",
            column=f"{column}.content",
            excerpt=text,
        )
    return text


# --- content as parts and blocks ---


@final
@dataclass(frozen=True)
class _Content:
    """What a content holds: text (or what was found in its place), and what blocks bring beside it."""

    text: Any
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)


def _read(content: Any, column: str) -> _Content:
    if not isinstance(content, Sequence) or isinstance(content, str):
        return _Content(content)
    texts: list[str] = []
    found = _Content(None)
    for part in content:
        match part:
            case {"type": "tool_use", "name": str(name), "input": Mapping() as arguments}:
                call = {"type": "function", "function": {"name": name, "arguments": arguments}}
                found.calls.append({"id": part["id"], **call} if part.get("id") else call)
            case {"type": "tool_result", "tool_use_id": str(number)}:
                inner = _read(part.get("content"), column).text
                result = "" if inner is None else _text(inner, column)
                found.results.append({"content": result, "tool_call_id": number})
            case {"type": "thinking", "thinking": str(thought)}:
                found.reasoning.append(thought)
            case {"text": str(text)} if part.get("weight") is None:
                texts.append(text)
            case _:
                raise DataError(
                    f"expected text or text parts without weights, got {describe(part)}.",
                    column=column,
                    excerpt=describe(part),
                )
    thought = "".join(found.reasoning)
    said = "".join(texts) if texts or not content else None
    return _Content(said, [thought] if thought else [], found.calls, found.results)


def _calls(value: Any, column: str) -> list[dict[str, Any]]:
    """Calls as templates read them: ``{"type": "function", "function": {"name", "arguments"}}``."""
    parsed = _parsed(value)
    calls = dicts_of([parsed] if isinstance(parsed, Mapping) else value, column)
    return [_call(call) for call in calls]


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    if "function" not in call and "name" in call:
        beside = {key: value for key, value in call.items() if key not in ("name", "arguments", "parameters")}
        arguments = call.get("arguments", call.get("parameters", {}))
        call = {"type": "function", **beside, "function": {"name": call["name"], "arguments": arguments}}
    function = call.get("function")
    if isinstance(function, Mapping) and isinstance(_parsed(function.get("arguments")), dict):
        call = {**call, "function": {**function, "arguments": _parsed(function["arguments"])}}
    return dict(call)


def _parsed(value: Any) -> Any:
    """What JSON text says; other values and other text as they are."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


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
