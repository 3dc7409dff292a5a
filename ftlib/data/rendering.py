"""Conversations to text, by transformers' sandboxed renderer alone.

Text that people wrote is told from the template's own by its control tokens: where a string of the
conversation holds one, it is rendered once more between private characters that show where it went.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ftlib.data.segments import Conversation, Message
from ftlib.errors import DataError

__all__ = ["Renderer", "template_error"]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PRIVATE = range(0xF0000, 0xFFFFC, 2)  # code points without a meaning, taken in pairs
# What a template's own code can raise on a conversation it does not expect.
_FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


@final
class Renderer:
    """Renders conversations with one tokenizer.

    Args:
        tokenizer: a private copy, used for rendering alone.
        control: matches the tokenizer's control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: re.Pattern[str]) -> None:
        self._tokenizer = tokenizer
        self.control = control
        self._injects: dict[str | None, bool] = {}  # template -> it writes a system text of its own

    def render(self, conversation: Conversation, *, generation: bool = False) -> str:
        """The text of all messages.

        Raises:
            DataError: code ``template``: the template refuses these messages, or there is none.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                _plain(conversation.messages),
                tools=_as_list(conversation.tools),
                chat_template=conversation.template,
                add_generation_prompt=generation,
                tokenize=False,
            )
        except _FAILURES as error:
            raise template_error(
                f"expected messages it can render, got {type(error).__name__}: {error}"
            ) from error
        return str(text)

    def with_literals(
        self, conversation: Conversation, *, generation: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and where people's own words in it look like control tokens.

        Such words are put between two private characters and rendered again; with the marks taken out,
        both texts must be equal.
        """
        text = self.render(conversation, generation=generation)
        if not self.has_control(conversation):
            return text, []
        used = set(text).union(*_strings(conversation))
        opening, closing = next((chr(c), chr(c + 1)) for c in _PRIVATE if not {chr(c), chr(c + 1)} & used)
        marked = _mapped(conversation, lambda s: self.control.sub(rf"{opening}\g<0>{closing}", s))
        literals: list[tuple[int, int]] = []
        plain: list[str] = []
        length = opened = 0
        for piece in re.split(f"([{opening}{closing}])", self.render(marked, generation=generation)):
            if piece == opening:
                opened = length
            elif piece == closing:
                literals.append((opened, length))
            else:
                plain.append(piece)
                length += len(piece)
        if "".join(plain) != text:
            raise template_error(
                "the text holds control tokens that the template rearranges, so they cannot be kept as text. "
                "Remove them from the data"
            )
        return text, literals

    def generation_spans(self, conversation: Conversation, text: str) -> dict[int, tuple[int, int]]:
        """Assistant turn -> the characters the template marks as generated; empty without marks."""
        tools = _as_list(conversation.tools)
        template = self._tokenizer.get_chat_template(conversation.template, tools)
        turns = [k for k, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if not turns or not _GENERATION.search(template):
            return {}
        variables: dict[str, Any] = dict(self._tokenizer.special_tokens_map)
        rendered: Any = render_jinja_template(
            [_plain(conversation.messages)],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **variables,
        )
        (written,), (spans,) = rendered
        if not text.startswith(written) or len(spans) != len(turns):
            return {}
        return dict(zip(turns, spans, strict=True))

    def injects_system(self, template: str | None) -> bool:
        """Whether the template writes a system text where the messages bring none."""
        if template not in self._injects:
            user = {"role": "user", "content": "a"}
            try:
                alone = self.render(Conversation((user,), template=template))
                empty = self.render(
                    Conversation(({"role": "system", "content": ""}, user), template=template)
                )
            except DataError:  # no system role at all
                alone = empty = ""
            self._injects[template] = len(alone) > len(empty)
        return self._injects[template]

    def has_control(self, conversation: Conversation) -> bool:
        """Whether any string that people wrote holds a control token."""
        return any(self.control.search(string) for string in _strings(conversation))


def template_error(message: str) -> DataError:
    """A template that cannot be used on these messages."""
    return DataError(f"chat template: {message}.", code="template", column="messages")


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _as_list(tools: tuple[Any, ...] | None) -> list[Any] | None:
    return None if tools is None else list(tools)


def _strings(conversation: Conversation) -> Iterator[str]:
    """Every string of a conversation that people wrote: all but keys, roles and weights."""

    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if key != "role":
                    yield from walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from walk(item)

    yield from walk(conversation.messages)
    yield from walk(conversation.tools)


def _mapped(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    """The conversation with `change` applied to each of these strings."""

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, Mapping):
            return {key: item if key == "role" else walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, (list, tuple)) else value

    tools = None if conversation.tools is None else tuple(walk(conversation.tools))
    return replace(conversation, messages=tuple(walk(conversation.messages)), tools=tools)
