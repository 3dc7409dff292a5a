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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from ftlib.data.rendering import Renderer, Spans, template_error
from ftlib.data.segments import Conversation, Message, Role, Segment, Segments
from ftlib.errors import DataError

__all__ = ["ChatTemplate"]

_NO_STOP = -1


class _UnverifiedError(Exception):
    """The spans of this rendering cannot be trusted; the message says why."""


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
@dataclass(frozen=True)
class _Rendered:
    """A conversation with its text.

    Args:
        conversation: what was rendered.
        text: all messages, and the generation prompt if `asked`.
        marked: assistant turn -> characters that the template marks as generated.
        spelled: strings that people wrote hold control tokens.
        literals: where these stand in `text`.
        asked: the text ends in the generation prompt.
    """

    conversation: Conversation
    text: str
    marked: Spans
    spelled: bool
    literals: Sequence[tuple[int, int]]
    asked: bool


@final
class ChatTemplate:
    """Renders conversations with one tokenizer's template.

    Args:
        tokenizer: a private copy, used for rendering alone.
        control: matches the tokenizer's control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: re.Pattern[str]) -> None:
        self._renderer = Renderer(tokenizer, control)

    def with_system(self, conversation: Conversation) -> tuple[Conversation, tuple[str, ...]]:
        """The conversation with the system message its options ask for, and notes for the report."""
        if conversation.messages[0]["role"] == "system":
            return conversation, ()
        injects = self._renderer.injects_system(conversation.template)
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
        whole = self._whole(conversation, asked=True)
        try:
            regions, _ = self._regions(whole, trained, spread=False)
        except _UnverifiedError:
            regions = []
        parts = _segments(whole, regions)
        return Segments((*parts, Segment("", "assistant", boundary=True)), bos=False, eos=False)

    def layout(
        self, conversation: Conversation, trained: Sequence[int], *, spread: bool
    ) -> tuple[Segments, ...]:
        """The examples of a conversation: one, or one per trained turn. `eos` means that a stop was missing.

        Args:
            conversation: at least one message.
            trained: assistant turns to be trained.
            spread: weights of other messages matter too, so these need spans of their own.

        Raises:
            DataError: code ``template``: rendering fails, or a turn cannot be located in its own example.
        """
        try:
            return (self._example(conversation, trained, spread=spread),)
        except _UnverifiedError as whole:
            if spread and _weighted(conversation, trained):
                raise template_error(f"cannot locate each weighted message: {whole}") from whole
        examples = []
        for k in trained:
            turn = replace(conversation, messages=conversation.messages[: k + 1])
            try:
                examples.append(self._example(turn, [k], spread=False))
            except _UnverifiedError as alone:
                raise template_error(f"turn {k + 1} of the conversation: {alone}") from alone
        return tuple(examples)

    def stop_tokens(self, template: str | None) -> set[str]:
        """The control tokens that end a turn under this template, found by rendering probe turns."""
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        answers: tuple[dict[str, Any], ...] = ({"content": "b"}, {"content": "", "tool_calls": [call]})
        stops = set()
        for answer in answers:
            messages = ({"role": "user", "content": "a"}, {"role": "assistant", **answer})
            try:
                examples = self.layout(Conversation(messages, template=template), [1], spread=False)
            except DataError:  # a template without tools may refuse the second probe
                continue
            matches = [
                match.group()
                for part in examples[0].parts
                if part.role == "assistant"
                for match in self._renderer.control.finditer(part.text)
            ]
            stops.update(matches[-1:])
        return stops

    def _example(self, conversation: Conversation, trained: Sequence[int], *, spread: bool) -> Segments:
        whole = self._whole(conversation)
        regions, stopped = self._regions(whole, trained, spread=spread)
        return Segments(_segments(whole, regions), bos=False, eos=not stopped)

    def _whole(self, conversation: Conversation, *, asked: bool = False) -> _Rendered:
        """The conversation rendered, `asked` with the generation prompt."""
        marked: Spans = {}
        if not asked:
            text, marked = self._renderer.marked(conversation)
        else:
            text = self._renderer.render(conversation, generation=True)
            if self._renderer.has_marks(conversation):
                written, spans = self._renderer.marked(conversation)
                marked = spans if text.startswith(written) else {}
        spelled = self._renderer.has_control(conversation)
        literals = self._renderer.literals(conversation, text, generation=asked) if spelled else []
        return _Rendered(conversation, text, marked, spelled, literals, asked)

    def _regions(
        self, whole: _Rendered, trained: Sequence[int], *, spread: bool
    ) -> tuple[list[_Region], bool]:
        """The spans of the trained turns (and weighted messages) in the text; whether the last one stops."""
        if 0 in trained:
            raise _UnverifiedError("the conversation starts with an assistant turn, so nothing prompts it")
        messages, text = whole.conversation.messages, whole.text
        regions = []
        stopped = True
        prompts = self._renderer.beginnings(whole.conversation, trained, generation=True)
        for k, prompt in zip(trained, prompts, strict=True):
            is_last = k == len(messages) - 1
            stop = self._turn(whole, k, prompt)
            if stop == _NO_STOP:
                if not is_last:
                    raise _UnverifiedError("the template ends this turn without a stop token")
                stop, stopped = len(text), False
            regions.append(_Region(len(prompt), stop, "assistant", _weight(messages[k]), boundary=True))
            blank = len(text) - len(text[stop:].lstrip())
            regions.append(_Region(stop, len(text) if is_last else blank, "tail"))
        if spread:
            for k in _weighted(whole.conversation, trained):
                start = len(self._through(whole, k - 1)) if k else 0
                through = self._through(whole, k)
                if not text.startswith(through):
                    raise _UnverifiedError(f"message {k + 1} has a weight, but no span of its own")
                regions.append(_Region(start, len(through), "prompt", _weight(messages[k])))
        return sorted(regions, key=lambda region: region.start), stopped

    def _turn(self, whole: _Rendered, k: int, prompt: str) -> int:
        """The end of turn k's stop token in the text, or `_NO_STOP`; the turn starts where `prompt` ends.

        `prompt`: what inference continues with turn k.
        """
        text, start = whole.text, len(prompt)
        if k in whole.marked and text.startswith(prompt) and whole.marked[k][0] == start:
            end = self._stop(whole, k, text[: whole.marked[k][1]], start)
            if end != _NO_STOP:
                return end
        through = self._through(whole, k)
        if not through.startswith(prompt):
            raise _UnverifiedError("the rendered turn does not start with its generation prompt")
        end = self._stop(whole, k, through, start)
        if not text.startswith(through if end == _NO_STOP else through[:end]):
            raise _UnverifiedError("the template renders this turn differently once others follow")
        return end

    def _stop(self, whole: _Rendered, k: int, text: str, start: int) -> int:
        """End of the first control token after the content of turn k; of the last one after tool calls."""
        message = whole.conversation.messages[k]
        literals = self._literals_of(whole, k + 1, text)
        controls = [
            match.span()
            for match in self._renderer.control.finditer(text, start)
            if not any(a < match.end() and match.start() < b for a, b in literals)
        ]
        content = str(message.get("content") or "").strip()
        where = _last_outside(text, content, start, controls) if content else start
        if where is None and not _holds(text[start:], content):
            raise _UnverifiedError("the template does not render the content whole")
        if not _holds(text[start:], str(message.get("reasoning") or "")):
            raise _UnverifiedError(
                "the template does not render the reasoning. Leave it out, or give another template"
            )
        for name in _called(message):
            if name not in text[start:]:
                raise _UnverifiedError(f"the template does not render the call of tool {name!r}")
        if where is None or message.get("tool_calls"):
            controls = controls[-1:]
        else:
            controls = [(a, b) for a, b in controls if a >= where]
        return controls[0][1] if controls else _NO_STOP

    def _literals_of(self, whole: _Rendered, count: int, text: str) -> list[tuple[int, int]]:
        if not whole.spelled:
            return []
        part = replace(whole.conversation, messages=whole.conversation.messages[:count])
        if not self._renderer.has_control(part):
            return []
        rendered = self._renderer.render(part)
        literals = self._renderer.literals(part, rendered)
        return literals if rendered.startswith(text) or text.startswith(rendered) else []

    def _through(self, whole: _Rendered, k: int) -> str:
        """The messages up to and with message k, rendered."""
        if k == len(whole.conversation.messages) - 1 and not whole.asked:
            return whole.text
        (text,) = self._renderer.beginnings(whole.conversation, [k + 1])
        return text


def _holds(text: str, said: str) -> bool:
    """Whether `said` stands in `text`, whatever becomes of its white space."""
    return said in text or "".join(said.split()) in "".join(text.split())


def _called(message: Message) -> list[str]:
    """Names of the tools a message calls."""
    return [str(call.get("function", call).get("name")) for call in message.get("tool_calls") or ()]


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


def _last_outside(text: str, content: str, start: int, spans: Sequence[tuple[int, int]]) -> int | None:
    """End of the last `content` in `text[start:]` that overlaps none of `spans`."""
    end = len(text)
    while (found := text.rfind(content, start, end)) >= 0:
        stop = found + len(content)
        if not any(a < stop and found < b for a, b in spans):
            return stop
        end = stop - 1
    return None


def _segments(whole: _Rendered, regions: Sequence[_Region]) -> tuple[Segment, ...]:
    """The text cut where the role changes; what no region covers is prompt."""
    text, literals = whole.text, whole.literals
    parts: list[Segment] = []
    done = 0
    for region in (*regions, _Region(len(text), len(text), "tail")):
        if region.start > done:
            parts += _cut(text, _Region(done, region.start, "prompt"), literals)
        start = max(region.start, done)
        if region.end > start or region.boundary:
            parts += _cut(text, region if start == region.start else replace(region, start=start), literals)
        done = max(done, region.end)
    return tuple(parts)


def _cut(text: str, region: _Region, literals: Sequence[tuple[int, int]]) -> Iterator[Segment]:
    """One region, its literal stretches in segments of their own."""
    if not literals:
        if region.end > region.start:
            yield Segment(text[region.start : region.end], region.role, region.weight, True, region.boundary)
        return
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
