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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from ftlib.data.rendering import Renderer, template_error
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
        text, literals = self._renderer.with_literals(conversation, generation=True)
        try:
            regions, _ = self._regions(conversation, trained, text, spread=False, ended=False)
        except _UnverifiedError:
            regions = []
        parts = _segments(text, regions, literals)
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
        text, literals = self._renderer.with_literals(conversation)
        regions, stopped = self._regions(conversation, trained, text, spread=spread)
        return Segments(_segments(text, regions, literals), bos=False, eos=not stopped)

    def _regions(
        self,
        conversation: Conversation,
        trained: Sequence[int],
        text: str,
        *,
        spread: bool,
        ended: bool = True,
    ) -> tuple[list[_Region], bool]:
        """The spans of the trained turns (and weighted messages) in `text`; whether the last one stops.

        `ended`: no generation prompt follows the last message in `text`.
        """
        marked = self._renderer.generation_spans(conversation, text)
        regions = []
        stopped = True
        for k in trained:
            is_last = k == len(conversation.messages) - 1
            through = text if is_last and ended else None
            start, stop = self._turn(conversation, k, text, marked, through)
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
        self,
        conversation: Conversation,
        k: int,
        text: str,
        marked: Mapping[int, tuple[int, int]],
        through: str | None,
    ) -> tuple[int, int]:
        """Start of turn k in `text`, and the end of its stop token or `_NO_STOP`.

        `through`: the messages up to turn k, where they were rendered already.
        """
        if k == 0:
            raise _UnverifiedError("the conversation starts with an assistant turn, so nothing prompts it")
        prompt = self._before(conversation, k, generation=True)
        if k in marked and text.startswith(prompt) and marked[k][0] == len(prompt):
            end = self._stop(conversation, k, text[: marked[k][1]], len(prompt))
            if end != _NO_STOP:
                return len(prompt), end
        if through is None:
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

    def _literals_of(self, conversation: Conversation, count: int, text: str) -> list[tuple[int, int]]:
        part = replace(conversation, messages=conversation.messages[:count])
        if not self._renderer.has_control(part):
            return []
        rendered, literals = self._renderer.with_literals(part)
        return literals if rendered.startswith(text) or text.startswith(rendered) else []

    def _before(self, conversation: Conversation, count: int, *, generation: bool = False) -> str:
        """The first `count` messages, rendered."""
        return self._renderer.render(
            replace(conversation, messages=conversation.messages[:count]), generation=generation
        )


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
