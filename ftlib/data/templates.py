"""Conversations to text with trained spans, by the tokenizer's own template and nothing else.

The template is rendered in transformers' sandbox. Where a turn starts and ends is found by rendering
the conversation up to it, never by looking for marker text:

1. ``{% generation %}`` marks in the template give the spans;
2. otherwise a turn is what ``render(messages[:k + 1])`` adds to ``render(messages[:k])`` with the
   generation prompt;
3. either is verified: that prompt starts the whole text, the span holds the content whole and ends in
   a stop token; a last turn without one gets EOS;
4. a template that fails this (one that drops earlier reasoning, for instance) gives one example per
   trained turn, each rendered as inference sees it;
5. where that fails too, an error names the turn.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ftlib.data.segments import Conversation, Message, Role, Segment, Segments
from ftlib.errors import DataError

__all__ = ["ChatTemplate", "Layout"]

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
_NO_STOP = -1


class _UnverifiedError(Exception):
    """The spans of this rendering cannot be trusted; the message says why."""


@final
@dataclass(frozen=True)
class Layout:
    """The examples of one conversation: one, or one per trained turn.

    Args:
        examples: text with roles and weights.
        notes: what was done beyond rendering, for the report.
    """

    examples: tuple[Segments, ...]
    notes: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class _Region:
    """Characters `start` to `end` of a rendered conversation."""

    start: int
    end: int
    role: Role
    weight: float | None = None
    boundary: bool = False


@final
class ChatTemplate:
    """Renders conversations with one tokenizer's template.

    Args:
        tokenizer: a private copy, used for rendering alone.
        control: matches the tokenizer's control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: re.Pattern[str]) -> None:
        self._tokenizer = tokenizer
        self._control = control
        self._injects: dict[str | None, bool] = {}  # template -> it writes a system text of its own

    def with_system(self, conversation: Conversation) -> tuple[Conversation, tuple[str, ...]]:
        """The conversation with the system message its options ask for, and notes for the report."""
        if conversation.messages[0]["role"] == "system":
            return conversation, ()
        injects = self._injects_system(conversation.template)
        if conversation.system is None or (conversation.system == "" and not injects):
            return conversation, ("system_from_template",) if injects else ()
        system = {"role": "system", "content": conversation.system}
        return replace(
            conversation, messages=(system, *conversation.messages), given=conversation.given + 1
        ), ("system_added",) if conversation.system else ()

    def prompt(self, conversation: Conversation, trained: Sequence[int]) -> Segments:
        """What inference continues: the messages, then the generation prompt.

        Args:
            conversation: messages up to the turn to be written.
            trained: assistant turns among them that training learns; tokens are cut there as in training.
        """
        text, literals = self._render_with_literals(conversation, generation=True)
        try:
            regions, _ = self._regions(conversation, trained, text, spread=False)
        except _UnverifiedError:
            regions = []
        parts = _segments(text, regions, literals)
        return Segments((*parts, Segment("", "assistant", boundary=True)), bos=False, eos=False)

    def layout(self, conversation: Conversation, trained: Sequence[int], *, spread: bool) -> Layout:
        """The examples of a conversation.

        Args:
            conversation: at least one message.
            trained: assistant turns to be trained.
            spread: weights of other messages matter too, so these need spans of their own.

        Raises:
            DataError: code ``template``: rendering fails, or a turn cannot be located in its own example.
        """
        try:
            return Layout(*self._example(conversation, trained, spread=spread))
        except _UnverifiedError as whole:
            if spread and _weighted(conversation, trained):
                raise _template_error(f"cannot locate each weighted message: {whole}") from whole
        examples, notes = [], ["exploded"]
        for k in trained:
            turn = replace(conversation, messages=conversation.messages[: k + 1])
            try:
                example, more = self._example(turn, [k], spread=False)
            except _UnverifiedError as alone:
                raise _template_error(f"turn {k + 1} of the conversation: {alone}") from alone
            examples += example
            notes += more
        return Layout(tuple(examples), tuple(notes))

    def stop_tokens(self, template: str | None) -> set[str]:
        """The control tokens that end a turn under this template, found by rendering probe turns."""
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        answers: tuple[dict[str, Any], ...] = ({"content": "b"}, {"content": "", "tool_calls": [call]})
        stops = set()
        for answer in answers:
            messages = ({"role": "user", "content": "a"}, {"role": "assistant", **answer})
            try:
                layout = self.layout(Conversation(messages, template=template), [1], spread=False)
            except DataError:  # a template without tools may refuse the second probe
                continue
            matches = [
                match.group()
                for part in layout.examples[0].parts
                if part.role == "assistant"
                for match in self._control.finditer(part.text)
            ]
            stops.update(matches[-1:])
        return stops

    def _example(
        self, conversation: Conversation, trained: Sequence[int], *, spread: bool
    ) -> tuple[tuple[Segments], tuple[str, ...]]:
        """One example of the whole conversation."""
        text, literals = self._render_with_literals(conversation)
        regions, stopped = self._regions(conversation, trained, text, spread=spread)
        example = Segments(_segments(text, regions, literals), bos=False, eos=not stopped)
        return (example,), () if stopped else ("stop_added",)

    def _regions(
        self, conversation: Conversation, trained: Sequence[int], text: str, *, spread: bool
    ) -> tuple[list[_Region], bool]:
        """The spans of the trained turns (and weighted messages) in `text`; whether the last one stops."""
        marked = self._generation_spans(conversation, text)
        regions = []
        stopped = True
        for k in trained:
            start, stop = self._turn(conversation, k, text, marked)
            is_last = k == len(conversation.messages) - 1
            if stop == _NO_STOP:
                if not is_last:
                    raise _UnverifiedError("the template ends this turn without a stop token")
                stop, stopped = len(text), False
            regions.append(
                _Region(start, stop, "assistant", _weight(conversation.messages[k]), boundary=True)
            )
            blank = len(text) - len(text[stop:].lstrip())
            regions.append(_Region(stop, len(text) if is_last else blank, "tail"))
        if spread:
            for k in _weighted(conversation, trained):
                start = len(self._before(conversation, k)) if k else 0
                through = self._before(conversation, k + 1)
                if not text.startswith(through):
                    raise _UnverifiedError(f"message {k + 1} has a weight, but no span of its own")
                regions.append(_Region(start, len(through), "prompt", _weight(conversation.messages[k])))
        return sorted(regions, key=lambda region: region.start), stopped

    def _turn(
        self, conversation: Conversation, k: int, text: str, marked: Mapping[int, tuple[int, int]]
    ) -> tuple[int, int]:
        """Start of turn k in `text`, and the end of its stop token or `_NO_STOP`."""
        if k == 0:
            raise _UnverifiedError("the conversation starts with an assistant turn, so nothing prompts it")
        prompt = self._before(conversation, k, generation=True)
        if k in marked and text.startswith(prompt) and marked[k][0] == len(prompt):
            end = self._stop(conversation, k, text[: marked[k][1]], len(prompt))
            if end != _NO_STOP:
                return len(prompt), end
        through = self._before(conversation, k + 1)
        if not through.startswith(prompt):
            raise _UnverifiedError("the rendered turn does not start with its generation prompt")
        end = self._stop(conversation, k, through, len(prompt))
        if not text.startswith(through if end == _NO_STOP else through[:end]):
            raise _UnverifiedError("the template renders this turn differently once others follow")
        return len(prompt), end

    def _stop(self, conversation: Conversation, k: int, text: str, start: int) -> int:
        """End of the first control token after the content of turn k; of the last one after tool calls."""
        message = conversation.messages[k]
        literals = self._literals_of(conversation, k + 1, text)
        controls = [
            match.span()
            for match in self._control.finditer(text, start)
            if not any(a < match.end() and match.start() < b for a, b in literals)
        ]
        content = str(message.get("content") or "").strip()
        where = _last_outside(text, content, start, controls) if content else start
        if where is None and "".join(content.split()) not in "".join(text[start:].split()):
            raise _UnverifiedError("the template does not render the content whole")
        if where is None or message.get("tool_calls"):
            controls = controls[-1:]
        else:
            controls = [(a, b) for a, b in controls if a >= where]
        return controls[0][1] if controls else _NO_STOP

    def _literals_of(self, conversation: Conversation, count: int, text: str) -> list[tuple[int, int]]:
        part = replace(conversation, messages=conversation.messages[:count])
        if not self._has_control(part):
            return []
        rendered, literals = self._render_with_literals(part)
        return literals if rendered.startswith(text) or text.startswith(rendered) else []

    def _before(self, conversation: Conversation, count: int, *, generation: bool = False) -> str:
        """The first `count` messages, rendered."""
        return self._render(
            replace(conversation, messages=conversation.messages[:count]), generation=generation
        )

    def _render(self, conversation: Conversation, *, generation: bool = False) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                _plain(conversation.messages),
                tools=_as_list(conversation.tools),
                chat_template=conversation.template,
                add_generation_prompt=generation,
                tokenize=False,
            )
        except _FAILURES as error:
            raise _template_error(
                f"expected messages it can render, got {type(error).__name__}: {error}"
            ) from error
        return str(text)

    def _generation_spans(self, conversation: Conversation, text: str) -> dict[int, tuple[int, int]]:
        """Assistant turn -> the characters the template marks as generated; empty without marks."""
        tools = _as_list(conversation.tools)
        template = self._tokenizer.get_chat_template(conversation.template, tools)
        turns = [k for k, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if not turns or not _GENERATION.search(template):
            return {}
        rendered, spans = render_jinja_template(
            [_plain(conversation.messages)],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        if not text.startswith(rendered[0]) or len(spans[0]) != len(turns):
            return {}
        return dict(zip(turns, spans[0], strict=True))

    def _render_with_literals(
        self, conversation: Conversation, *, generation: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text, and where people's own words in it look like control tokens.

        Such words are put between two private characters and rendered again; with the marks taken out,
        both texts must be equal.
        """
        text = self._render(conversation, generation=generation)
        if not self._has_control(conversation):
            return text, []
        used = set(text).union(*_strings(conversation))
        opening, closing = next((chr(c), chr(c + 1)) for c in _PRIVATE if not {chr(c), chr(c + 1)} & used)
        marked = _mapped(conversation, lambda s: self._control.sub(rf"{opening}\g<0>{closing}", s))
        literals: list[tuple[int, int]] = []
        plain: list[str] = []
        length = opened = 0
        for piece in re.split(f"([{opening}{closing}])", self._render(marked, generation=generation)):
            if piece == opening:
                opened = length
            elif piece == closing:
                literals.append((opened, length))
            else:
                plain.append(piece)
                length += len(piece)
        if "".join(plain) != text:
            raise _template_error(
                "the text holds control tokens that the template rearranges, so they cannot be kept as text. "
                "Remove them from the data"
            )
        return text, literals

    def _has_control(self, conversation: Conversation) -> bool:
        return any(self._control.search(string) for string in _strings(conversation))

    def _injects_system(self, template: str | None) -> bool:
        """Whether the template writes a system text where the messages bring none."""
        if template not in self._injects:
            user = {"role": "user", "content": "a"}
            try:
                alone = self._render(Conversation((user,), template=template))
                empty = self._render(
                    Conversation(({"role": "system", "content": ""}, user), template=template)
                )
            except DataError:  # no system role at all
                alone = empty = ""
            self._injects[template] = len(alone) > len(empty)
        return self._injects[template]


def _template_error(message: str) -> DataError:
    return DataError(f"chat template: {message}.", code="template", column="messages")


def _weight(message: Message) -> float | None:
    weight = message.get("weight")
    return None if weight is None else float(weight)


def _weighted(conversation: Conversation, trained: Sequence[int]) -> list[int]:
    """Messages with a weight of their own that are not trained turns."""
    return [
        k
        for k, message in enumerate(conversation.messages)
        if message.get("weight") is not None and k not in trained
    ]


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _as_list(tools: tuple[Any, ...] | None) -> list[Any] | None:
    return None if tools is None else list(tools)


def _last_outside(text: str, content: str, start: int, spans: Sequence[tuple[int, int]]) -> int | None:
    """End of the last `content` in `text[start:]` that overlaps none of `spans`."""
    end = len(text)
    while (found := text.rfind(content, start, end)) >= 0:
        stop = found + len(content)
        if not any(a < stop and found < b for a, b in spans):
            return stop
        end = stop - 1
    return None


def _segments(
    text: str, regions: Sequence[_Region], literals: Sequence[tuple[int, int]]
) -> tuple[Segment, ...]:
    """`text` cut where the role changes; what no region covers is prompt."""
    parts: list[Segment] = []
    done = 0
    for region in (*regions, _Region(len(text), len(text), "tail")):
        if region.start > done:
            parts += _cut(text, _Region(done, region.start, "prompt"), literals)
        start = max(region.start, done)
        if region.end > start or region.boundary:
            parts += _cut(text, replace(region, start=start), literals)
        done = max(done, region.end)
    return tuple(parts)


def _cut(text: str, region: _Region, literals: Sequence[tuple[int, int]]) -> Iterator[Segment]:
    """One region, its literal stretches in segments of their own."""
    edges = sorted(
        {
            region.start,
            region.end,
            *(edge for span in literals for edge in span if region.start < edge < region.end),
        }
    )
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        control = not any(a <= start and end <= b for a, b in literals)
        yield Segment(text[start:end], region.role, region.weight, control, region.boundary and number == 0)


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
