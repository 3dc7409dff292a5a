"""What an instruction row says, whatever its columns are called."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from ftlib.data.messages import is_message_list, restored
from ftlib.data.segments import Message, Row
from ftlib.errors import DataError

__all__ = ["Task", "column", "is_task", "read_task", "string"]

_INSTRUCTION = ("instruction", "prompt", "question", "query", "inputs", "inputs_pretokenized")
_INPUT = ("input", "context")
_OUTPUT = ("output", "response", "completion", "answer", "targets", "targets_pretokenized")
_SYSTEM = ("system", "system_prompt")


@final
@dataclass(frozen=True)
class Task:
    """One row. Blank text counts as absent.

    Args:
        instruction: what is asked.
        input: what it is about.
        output: the answer; absent at inference.
        system: how to behave.
        history: earlier questions with their answers.
    """

    instruction: str
    input: str | None = None
    output: str | None = None
    system: str | None = None
    history: tuple[tuple[str, str], ...] = ()

    def joined(self, joiner: str) -> str:
        """Instruction and input as one text."""
        return self.instruction if self.input is None else self.instruction + joiner + self.input

    def turns(self, joiner: str) -> tuple[Message, ...]:
        """All but the output as messages, the last one the user's."""
        turns: list[Message] = []
        if self.system is not None:
            turns.append({"role": "system", "content": self.system})
        for asked, answered in self.history:
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return (*turns, {"role": "user", "content": self.joined(joiner)})


def read_task(row: Row) -> Task:
    """The task of a row with columns such as `instruction` and `output` in any case, or with `messages`.

    Raises:
        DataError: no instruction, or columns that hold something else than text.
    """
    for name in ("messages", "prompt"):
        if is_message_list(row.get(name)):
            more = row.get("completion") if name == "prompt" else None
            return _of_messages([*row[name], *(more or [])], name)
    instruction = string(row, *_INSTRUCTION)
    if instruction is None:
        raise DataError(
            f"expected an instruction to follow, found {sorted(row)}. Map the columns, or give template text "
            "with their names.",
            code="missing_column",
            column="instruction",
        )
    return Task(
        instruction, string(row, *_INPUT), string(row, *_OUTPUT), string(row, *_SYSTEM), _history(row)
    )


def is_task(row: Row) -> bool:
    """Whether the row has something that `read_task` takes for an instruction."""
    messages = any(is_message_list(row.get(name)) for name in ("messages", "prompt"))
    return messages or isinstance(column(row, *_INSTRUCTION), str)


def column(row: Row, *names: str) -> Any:
    """The value of the first of these columns that the row has, in any case; null is absent."""
    present = {name.casefold(): value for name, value in row.items() if value is not None}
    return next((present[name] for name in names if name in present), None)


def string(row: Row, *names: str) -> str | None:
    """The text of the first of these columns; None where it is absent or blank.

    Raises:
        DataError: something else than text.
    """
    value = column(row, *names)
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"expected text, got {value!r:.80}.", column=names[0])
    return value if value.strip() else None


def _history(row: Row) -> tuple[tuple[str, str], ...]:
    value = column(row, "history")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
    found = value or []
    if not isinstance(found, Sequence) or not all(map(_is_exchange, found)):
        raise DataError(
            f"expected a list of pairs of question and answer, got {value!r:.80}.", column="history"
        )
    return tuple((asked, answered) for asked, answered in found)


def _is_exchange(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _of_messages(stored: Sequence[Mapping[str, Any]], name: str) -> Task:
    messages = [restored(message, f"{name}[{k}]") for k, message in enumerate(stored)]
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
    roles = [message["role"] for message in messages]
    wanted = [("user", "assistant")[k % 2] for k in range(len(roles))]
    if not roles or roles != wanted or any(message.get("tool_calls") for message in messages):
        raise DataError(
            f"expected user and assistant in turn, got {roles}. Other conversations go through "
            "formatters.chat().",
            column=name,
        )
    texts = [str(message["content"]) for message in messages]
    output = texts.pop() if roles[-1] == "assistant" else None
    history = tuple(zip(texts[:-1:2], texts[1:-1:2], strict=True))
    return Task(texts[-1], None, output, system or None, history)
