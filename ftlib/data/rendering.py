"""Conversations to text, by transformers' sandboxed renderer alone.

A template that is new here is tried in a process of its own first (`ftlib.data.trial`).

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
from ftlib.data.trial import try_template
from ftlib.errors import DataError

__all__ = ["Renderer", "Spans", "template_error"]

Spans = Mapping[int, tuple[int, int]]  # message -> its characters

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
        self._special: dict[str, Any] = dict(tokenizer.special_tokens_map)  # known to templates by name
        self.control = control
        self._injects: dict[str | None, bool] = {}  # template -> it writes a system text of its own

    def render(self, conversation: Conversation, *, generation: bool = False) -> str:
        """The text of all messages.

        Raises:
            DataError: code ``template``: the template refuses these messages, or there is none.
        """
        (text,) = self.beginnings(conversation, [len(conversation.messages)], generation=generation)
        return text

    def beginnings(
        self, conversation: Conversation, counts: Sequence[int], *, generation: bool = False
    ) -> list[str]:
        """The text of the first so many messages, for each of `counts`, all at least 1.

        Raises:
            DataError: as in `render`.
        """
        texts, _ = self._rendered(conversation, counts, generation=generation)
        return texts

    def marked(self, conversation: Conversation) -> tuple[str, Spans]:
        """The text of all messages, and assistant turn -> the characters the template marks as generated.

        No spans where the marks are not one per turn, or are none.

        Raises:
            DataError: as in `render`.
        """
        turns = [k for k, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        marks = bool(turns) and self.has_marks(conversation)
        (text,), (spans,) = self._rendered(conversation, [len(conversation.messages)], marks=marks)
        return text, dict(zip(turns, spans, strict=True)) if len(spans) == len(turns) else {}

    def literals(
        self, conversation: Conversation, text: str, *, generation: bool = False
    ) -> list[tuple[int, int]]:
        """Where people's own words in `text`, the rendered conversation, look like control tokens.

        Such words are put between two private characters and rendered again; with the marks taken out,
        both texts must be equal.

        Raises:
            DataError: code ``template``: they are not.
        """
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
        return literals

    def has_marks(self, conversation: Conversation) -> bool:
        """Whether the template of this conversation marks what is generated.

        Raises:
            DataError: code ``template``: there is none.
        """
        return _GENERATION.search(self._template(conversation)) is not None

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

    def _rendered(
        self,
        conversation: Conversation,
        counts: Sequence[int],
        *,
        generation: bool = False,
        marks: bool = False,
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:
        """The text of the first so many messages, for each of `counts`, and what is marked in each.

        One call for all, past the tokenizer, which would tell the template of its special tokens each time.
        """
        messages = _plain(conversation.messages)
        template = self._template(conversation)
        wrong = try_template(template, messages, self._special, conversation.tools)
        if wrong is not None:
            raise template_error(f"{wrong}. It is not rendered here; use another template")
        try:
            made: Any = render_jinja_template(
                [messages[:count] for count in counts],
                tools=None if conversation.tools is None else list(conversation.tools),
                chat_template=template,
                add_generation_prompt=generation,
                return_assistant_tokens_mask=marks,
                **self._special,
            )
        except _FAILURES as error:
            raise _unrenderable(error) from error
        texts, spans = made
        return texts, spans or [[] for _ in texts]

    def _template(self, conversation: Conversation) -> str:
        tools = None if conversation.tools is None else list(conversation.tools)
        try:
            return str(self._tokenizer.get_chat_template(conversation.template, tools))
        except _FAILURES as error:
            raise _unrenderable(error) from error


def _unrenderable(error: Exception) -> DataError:
    return template_error(f"expected messages it can render, got {type(error).__name__}: {error}")


def template_error(message: str) -> DataError:
    """A template that cannot be used on these messages."""
    return DataError(f"chat template: {message}.", code="template", column="messages")


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As `apply_chat_template` gives them to a template, without our weights: null keys are absent."""
    return [
        {key: value for key, value in message.items() if key != "weight" and value is not None}
        for message in messages
    ]


def _strings(conversation: Conversation) -> Iterator[str]:
    """Every string of a conversation that people wrote: all but keys, roles and weights."""

    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if key == "role":
                    continue
                if type(item) is str:  # nearly always
                    yield item
                else:
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
