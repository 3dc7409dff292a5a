"""Rows to encoded examples, in memory. `Encoder` puts data sets, caching and reporting around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

from ftlib.data.examples import Example, refused
from ftlib.data.groups import common, pairs, refuse_identical, share
from ftlib.data.joining import Joiner, Side
from ftlib.data.overflow import Overflow, Weighted, fit
from ftlib.data.pieces import stretches
from ftlib.data.ready import check_ready, ready
from ftlib.data.segments import Answers, Conversation, Made, Row, Segments, Skipped, Tokens, TrainOn
from ftlib.data.shorten import shortened
from ftlib.data.stops import stop_is_trained
from ftlib.data.templates import ChatTemplate
from ftlib.data.tokens import TokenBackend
from ftlib.data.weights import segment_weights, trained_turns
from ftlib.errors import ConfigError, DataError

__all__ = ["RowEncoder"]

_CHECKED_ROWS, _CHECKED_EVERY = 256, 1000  # rows whose invariants are asserted


@final
@dataclass(frozen=True)
class _Plan:
    """One example ready for the tokenizer: one side, or several that share their prompt."""

    sides: tuple[Side, ...]
    source: str
    first: bool
    checked: bool
    extras: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    cut: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(note for side in self.sides for note in side.notes))


@final
@dataclass(frozen=True)
class RowEncoder:
    """What an `Encoder` does to rows; its fields are those of `Encoder`, resolved.

    `extras` names the numbers per answer that every row brings. `apart`: an encoder reads the prompt as a
    sequence of its own, and a decoder begins another with the answer.
    """

    backend: TokenBackend
    template: ChatTemplate
    formatter: Callable[[Row], Made]
    train_on: TrainOn
    prompt_loss_weight: float
    max_length: int | None
    overflow: Overflow
    stop_ids: frozenset[int]
    extras: tuple[str, ...] = ()
    apart: bool = False

    @property
    def _joiner(self) -> Joiner:
        return Joiner(self.backend, apart=self.apart)

    def encode(self, rows: Sequence[Row], indices: Sequence[int]) -> list[Example]:
        """The examples of some rows, at least one per row, in order. A bad row gives its problem.

        Args:
            rows: dicts; `_source` names where each came from.
            indices: position of each row in the data.
        """
        plans: list[_Plan | Example] = []
        for row, index in zip(rows, indices, strict=True):
            source = str(row.get("_source") or f"<records>:{index + 1}")
            try:
                plans += self._plan(row, source, checked=index < _CHECKED_ROWS or index % _CHECKED_EVERY == 0)
            except DataError as error:
                plans.append(refused(source, error))
        # All pieces of all rows go to the tokenizer together: a call per piece would cost more than its work.
        pieces = [
            piece for plan in plans if isinstance(plan, _Plan) for side in plan.sides for piece in side.pieces
        ]
        encoded = iter(self.backend.encode(pieces))
        return [plan if isinstance(plan, Example) else self._finish(plan, encoded) for plan in plans]

    def prompt_ids(self, row: Row) -> list[int]:
        """What inference puts before the completion of `row`: the prefix ids of training."""
        made = self.formatter(row)
        if isinstance(made, Skipped):
            raise DataError(f"expected a row to answer, got one that is left out: {made.reason}.")
        if isinstance(made, Tokens):
            return list(self._ready(made, "").prefix[0])
        if isinstance(made, Answers):
            prompts = [self._prompt_ids(example) for example in made.examples]
            return prompts[0][: common(prompts)]
        return self._prompt_ids(made)

    def _prompt_ids(self, made: Segments | Conversation) -> list[int]:
        whole = False  # the row is all prompt
        if isinstance(made, Conversation):
            made, _ = self.template.with_system(made)
            whole = made.messages[-1]["role"] != "assistant"
            alone = self.apart or self.train_on == "last"
            trained = [] if alone else trained_turns(made, self.train_on)
            segments = self.template.prompt(made, trained) if whole else self._laid_out(made)[0]
        else:
            end = next((i for i, part in enumerate(made.parts) if part.boundary), len(made.parts))
            segments, whole = replace(made, parts=made.parts[:end]), True
        weights = segment_weights(segments, self.train_on, self.prompt_loss_weight)
        planned = stretches(segments, weights, self.backend)
        asked = (*(planned.prefix or ()), *(planned.rest if whole else ()))
        ids = [i for piece_ids, _ in self.backend.encode(asked) for i in piece_ids]
        return self._joiner.as_prompt(ids, [], segments)[0]

    def _plan(self, row: Row, source: str, *, checked: bool) -> list[_Plan | Example]:
        made = self.formatter(row)
        if isinstance(made, Skipped):
            return [Example(([], []), (), source, dropped=made.reason)]
        if isinstance(made, Tokens):
            return [self._ready(made, source)]
        given = made.extras if isinstance(made, Answers) else {}
        self._check_extras(given)
        cut = False
        if self.max_length is not None and not isinstance(made, Conversation):
            made, cut = shortened(made, self.backend.tokenizer, self._excess)
        if not isinstance(made, Answers):
            return [
                _Plan((side,), source, first=number == 0, checked=checked, cut=cut)
                for number, side in enumerate(self._sides(made))
            ]
        self._check_answers(made)
        sides = [self._sides(example) for example in made.examples]
        if any(len(examples) > 1 for examples in sides):
            raise DataError(
                "chat template: it renders the earlier turns of an answer differently once others follow, so "
                "an answer of several assistant turns is no single text. Keep one assistant turn per answer.",
                code="template",
            )
        return [
            _Plan(tuple(examples[0] for examples in sides), source, True, checked, given, cut),
        ]

    def _ready(self, made: Tokens, source: str) -> Example:
        check_ready(self.train_on, self.prompt_loss_weight, apart=self.apart)
        return ready(
            made,
            source,
            everything=self.train_on == "all",
            max_length=self.max_length,
            overflow=self.overflow,
            vocabulary=len(self.backend.tokenizer),
            stop_ids=self.stop_ids,
        )

    def _excess(self, made: Segments | Answers) -> int:
        """Tokens by which an example is longer than `max_length`."""
        examples = made.examples if isinstance(made, Answers) else (made,)
        sides = [side for example in examples for side in self._sides(example)]
        joined = [self._joiner.joined(side, iter(self.backend.encode(side.pieces))) for side in sides]
        longest = max(len(rest[0]) + (len(prompt[0]) if prompt else 0) for prompt, rest in joined)
        return longest - (self.max_length or longest)

    def _sides(self, made: Segments | Conversation) -> list[Side]:
        """One example as text; several where a template needs one per trained turn."""
        if isinstance(made, Conversation):
            made, notes = self.template.with_system(made)
            return [self._side(segments, notes) for segments in self._laid_out(made)]
        if isinstance(made, Segments):
            return [self._side(made, ())]
        raise ConfigError(
            "Encoder: expected the formatter to return Segments, Conversation or Answers, "
            f"got {type(made).__name__}."
        )

    def _side(self, segments: Segments, notes: tuple[str, ...]) -> Side:
        if segments.eos and self.backend.eos_id is None:
            raise ConfigError(
                "Encoder: the examples end in EOS, and this tokenizer has no eos_token. Set one."
            )
        weights = segment_weights(segments, self.train_on, self.prompt_loss_weight)
        planned = stretches(segments, weights, self.backend, apart=self.apart)
        if self.apart and planned.prefix is None and any(weights):
            raise _no_prompt("text without a prompt")
        if segments.eos and not segments.bos:  # a rendered conversation that the template leaves open
            notes = (*notes, "stop_added")
        if planned.literal:
            notes = (*notes, "control_text")
        return Side(segments, weights, planned, notes)

    def _check_extras(self, given: Mapping[str, tuple[float, ...]]) -> None:
        for name in sorted(set(given) ^ set(self.extras)):
            found = "none" if name in self.extras else "one"
            raise DataError(
                f"expected {name} in every row or in none, got {found} here, unlike in the first row.",
                column=name,
            )

    def _check_answers(self, made: Answers) -> None:
        """Options and shapes that make no sense for several answers to one prompt."""
        if self.train_on not in ("completion", "last") or self.prompt_loss_weight:
            raise ConfigError(
                f"Encoder: train_on={self.train_on!r:.40} with prompt_loss_weight={self.prompt_loss_weight} "
                "would train the prompt, which belongs to several answers here. Use train_on="
                '"completion" or "last" and no prompt_loss_weight.'
            )
        count = len(made.examples)
        wrong = {name: len(values) for name, values in made.extras.items() if len(values) != count}
        if count < 2 or wrong:
            raise ConfigError(
                "Encoder: expected Answers of at least two examples, and one number per example in each "
                f"extra, got {count} examples and numbers {wrong}."
            )

    def _laid_out(self, conversation: Conversation) -> tuple[Segments, ...]:
        trained = trained_turns(conversation, self.train_on)
        extra = self.train_on == "weighted" and any(
            message.get("weight") for message in conversation.messages
        )
        if not trained and not extra:
            roles = ", ".join(message["role"] for message in conversation.messages)
            raise DataError(
                f"expected a trained token, got none: train_on={self.train_on!r:.40} trains no turn of the "
                f"roles {roles}.",
                code="empty_target",
                column="messages",
            )
        if self.apart:  # whatever stands before a turn is read by the encoder, earlier answers included
            turns = [(replace(conversation, messages=conversation.messages[: k + 1]), k) for k in trained]
            return tuple(self.template.layout(turn, [k], spread=False)[0] for turn, k in turns)
        spread = callable(self.train_on) or self.train_on in ("all", "weighted")
        return self.template.layout(conversation, trained, spread=spread or self.prompt_loss_weight > 0)

    def _finish(self, plan: _Plan, encoded: Iterator[Weighted]) -> Example:
        """Join the pieces of one example, fit it to `max_length`, and check what is trained."""
        sides = [self._joiner.joined(side, encoded) for side in plan.sides]
        bos = len(self.backend.bos_ids) if plan.sides[0].segments.bos else 0
        compared = pairs(len(sides), plan.extras)
        try:
            if plan.checked:
                for side, (prompt, rest) in zip(plan.sides, sides, strict=True):
                    self._joiner.check_control(side, prompt[0] + rest[0] if prompt else rest[0])
            whole = self._together(sides, compared, bos)
            fitted = fit(*whole, self.max_length, self.overflow, bos=bos)
            if fitted is None:
                return Example(*whole, plan.source, plan.extras, first=plan.first, dropped="too_long")
            cut = fitted != whole
            prefix, answers = fitted
            trained = [_trained(prefix, answer) for answer in answers]
            for number, side in enumerate(plan.sides):
                if not trained[number] or not answers[number][0]:
                    raise self._empty_target(side, number if compared else None, cut=cut)
            if cut:
                refuse_identical(answers, compared, self.max_length)
        except DataError as error:
            return refused(plan.source, error, first=plan.first)
        notes = plan.notes
        if cut or plan.cut:
            notes = (*notes, "truncated")
        written = not plan.sides[0].segments.closed
        if written and not all(
            stop_is_trained(prefix[0] + ids, prefix[1] + weights, self.stop_ids, self.backend)
            for ids, weights in answers
        ):
            notes = (*notes, "without_terminator")
        return Example(
            prefix, answers, plan.source, plan.extras, sum(trained), len(compared), notes, plan.first
        )

    def _together(
        self, sides: list[tuple[Weighted | None, Weighted]], compared: list[tuple[int, int]], bos: int
    ) -> tuple[Weighted, tuple[Weighted, ...]]:
        """Prefix and continuations of one answer or of several."""
        if self.apart:
            self._check_prompts([prompt for prompt, _ in sides])
        if len(sides) == 1:
            prompt, rest = sides[0]
            return prompt or ([], []), (rest,)
        prefix, answers = share(sides, bos=bos)
        refuse_identical(answers, compared)
        return prefix, answers

    def _check_prompts(self, prompts: Sequence[Weighted | None]) -> None:
        """An encoder reads one prompt, and a whole one: none of it may go over to the decoder."""
        if not all(prompt and prompt[0] for prompt in prompts):
            raise _no_prompt("an empty prompt")
        if any(prompt != prompts[0] for prompt in prompts):
            raise DataError(
                "expected answers to one prompt, got prompts that differ, of which an encoder can read one. "
                "Remove the row, or give the prompt in a column of its own.",
                code="prompts_differ",
            )

    def _empty_target(self, side: Side, number: int | None, *, cut: bool) -> DataError:
        if cut:
            cause = f"the prompt alone fills max_length={self.max_length}"
        elif not any(weight > 0 for weight in side.weights):
            cause = f"train_on={self.train_on!r:.40} gives every part weight 0"
        elif not any(
            part.text for part, weight in zip(side.segments.parts, side.weights, strict=True) if weight > 0
        ):
            cause = "the trained text is empty"
        elif number is None:
            cause = "the only trained token is the first one, and no token before it predicts it"
        else:
            cause = "the other answers begin with all of it"
        where = "" if number is None else f" in answer {number + 1}"
        return DataError(f"expected a trained token{where}, got none: {cause}.", code="empty_target")


def _no_prompt(found: str) -> DataError:
    return DataError(
        f"expected a prompt for the encoder to read, got {found}. Give rows with prompt and completion.",
        code="no_prompt",
    )


def _trained(prefix: Weighted, rest: Weighted) -> int:
    """Tokens of weight > 0, but for the first of the sequence, which nothing predicts."""
    return sum(weight > 0 for weight in (prefix[1] + rest[1])[1:])
