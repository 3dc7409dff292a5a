"""Rows to encoded examples, in memory. `Encoder` puts data sets, caching and reporting around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from ftlib.data.pieces import Stretches, stretches
from ftlib.data.segments import Conversation, Row, Segments, TrainOn
from ftlib.data.templates import ChatTemplate
from ftlib.data.tokens import TokenBackend
from ftlib.data.weights import segment_weights, trained_turns
from ftlib.errors import ConfigError, DataError

__all__ = ["Example", "Overflow", "RowEncoder"]

Overflow = Literal["error", "drop", "truncate_prompt", "truncate"]
Weighted = tuple[list[int], list[float]]  # ids and their weights
_CHECKED_ROWS, _CHECKED_EVERY = 256, 1000  # rows whose invariants are asserted


@final
@dataclass(frozen=True)
class Example:
    """One encoded example and what became of it.

    Args:
        prefix: ids and weights of the prefix.
        rest: ids and weights of the continuation.
        source: where the row came from, ``file:row``.
        trained: tokens of weight > 0 that have a token before them.
        notes: names of counters of the report.
        first: the first example of its row.
        dropped: why it is left out, or `None`.
        problem: why the row is refused, or `None`; a refused row has no tokens.
    """

    prefix: Weighted
    rest: Weighted
    source: str
    trained: int = 0
    notes: tuple[str, ...] = ()
    first: bool = True
    dropped: str | None = None
    problem: DataError | None = None

    @property
    def length(self) -> int:
        """Tokens of the example."""
        return len(self.prefix[0]) + len(self.rest[0])


@final
@dataclass(frozen=True)
class _Plan:
    """One example ready for the tokenizer."""

    segments: Segments
    weights: tuple[float, ...]
    stretches: Stretches
    notes: tuple[str, ...]
    source: str
    first: bool
    checked: bool


@final
@dataclass(frozen=True)
class RowEncoder:
    """What an `Encoder` does to rows; its fields are those of `Encoder`, resolved."""

    backend: TokenBackend
    template: ChatTemplate
    formatter: Callable[[Row], Segments | Conversation]
    train_on: TrainOn
    prompt_loss_weight: float
    max_length: int | None
    overflow: Overflow
    stop_ids: frozenset[int]

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
                plans.append(_refused(source, error))
        # All pieces of all rows go to the tokenizer together: a call per piece would cost more than its work.
        pieces = [
            piece
            for plan in plans
            if isinstance(plan, _Plan)
            for piece in (*(plan.stretches.prefix or ()), *plan.stretches.rest)
        ]
        encoded = iter(self.backend.encode(pieces))
        return [plan if isinstance(plan, Example) else self._finish(plan, encoded) for plan in plans]

    def prompt_ids(self, row: Row) -> list[int]:
        """What inference puts before the completion of `row`: the prefix ids of training."""
        made = self.formatter(row)
        whole = False  # the row is all prompt
        if isinstance(made, Conversation):
            made, _ = self.template.with_system(made)
            whole = made.messages[-1]["role"] != "assistant"
            trained = [] if self.train_on == "last" else trained_turns(made, self.train_on)
            segments = self.template.prompt(made, trained) if whole else self._laid_out(made)[0]
        else:
            end = next((i for i, part in enumerate(made.parts) if part.boundary), len(made.parts))
            segments, whole = replace(made, parts=made.parts[:end]), True
        weights = segment_weights(segments, self.train_on, self.prompt_loss_weight)
        planned = stretches(segments, weights, self.backend)
        asked = (*(planned.prefix or ()), *(planned.rest if whole else ()))
        ids = [i for piece_ids, _ in self.backend.encode(asked) for i in piece_ids]
        return self._with_bos(ids, [], segments)[0]

    def _plan(self, row: Row, source: str, *, checked: bool) -> list[_Plan]:
        made = self.formatter(row)
        notes: tuple[str, ...] = ()
        if isinstance(made, Conversation):
            made, notes = self.template.with_system(made)
            examples = self._laid_out(made)
        elif isinstance(made, Segments):
            examples = (made,)
        else:
            raise ConfigError(
                f"Encoder: expected the formatter to return Segments or Conversation, "
                f"got {type(made).__name__}."
            )
        return [
            self._planned(segments, notes, source, first=number == 0, checked=checked)
            for number, segments in enumerate(examples)
        ]

    def _planned(
        self, segments: Segments, notes: tuple[str, ...], source: str, *, first: bool, checked: bool
    ) -> _Plan:
        if segments.eos and self.backend.eos_id is None:
            raise ConfigError(
                "Encoder: the examples end in EOS, and this tokenizer has no eos_token. Set one."
            )
        weights = segment_weights(segments, self.train_on, self.prompt_loss_weight)
        planned = stretches(segments, weights, self.backend)
        if segments.eos and not segments.bos:  # a rendered conversation that the template leaves open
            notes = (*notes, "stop_added")
        if planned.literal:
            notes = (*notes, "control_text")
        return _Plan(segments, weights, planned, notes, source, first, checked)

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
        spread = callable(self.train_on) or self.train_on in ("all", "weighted")
        return self.template.layout(conversation, trained, spread=spread or self.prompt_loss_weight > 0)

    def _finish(self, plan: _Plan, encoded: Any) -> Example:
        """Join the pieces of one example, fit them to `max_length`, and check what is trained."""
        parts = plan.stretches
        prefix = _joined(encoded, len(parts.prefix or ()))
        rest = _joined(encoded, len(parts.rest))
        if parts.prefix is None:
            rest = self._with_bos(*rest, plan.segments)
        else:
            prefix = self._with_bos(*prefix, plan.segments)
        if plan.segments.eos and self.backend.eos_id is not None and rest[0][-1:] != [self.backend.eos_id]:
            rest[0].append(self.backend.eos_id)
            rest[1].append(plan.weights[-1])
        notes = plan.notes
        try:
            if plan.checked:
                self._assert_control(plan, prefix[0] + rest[0])
            whole = len(prefix[0]) + len(rest[0])
            fitted = self._fit(prefix, rest, plan)
            if fitted is None:
                return Example(prefix, rest, plan.source, first=plan.first, dropped="too_long")
            prefix, rest = fitted
            trained = _trained(prefix, rest)
            if not trained:
                raise self._empty_target(plan, cut=len(prefix[0]) + len(rest[0]) < whole)
        except DataError as error:
            return _refused(plan.source, error, first=plan.first)
        if len(prefix[0]) + len(rest[0]) < whole:
            notes = (*notes, "truncated")
        if not self._stops(prefix, rest):
            notes = (*notes, "without_terminator")
        return Example(prefix, rest, plan.source, trained, notes, plan.first)

    def _with_bos(self, ids: list[int], weights: list[float], segments: Segments) -> Weighted:
        """What the tokenizer puts before plain text goes first, once; nothing predicts it, so it weighs 0."""
        bos = list(self.backend.bos_ids) if segments.bos else []
        if ids[: len(bos)] == bos:
            return ids, weights
        return [*bos, *ids], [*([0.0] * len(bos)), *weights]

    def _fit(self, prefix: Weighted, rest: Weighted, plan: _Plan) -> tuple[Weighted, Weighted] | None:
        """The example within `max_length`; `None` drops it."""
        excess = 0 if self.max_length is None else len(prefix[0]) + len(rest[0]) - self.max_length
        if excess <= 0:
            return prefix, rest
        if self.overflow == "drop":
            return None
        if self.overflow == "truncate":
            kept = len(rest[0]) - excess
            if kept > 0:
                return prefix, (rest[0][:kept], rest[1][:kept])
            return (prefix[0][: self.max_length], prefix[1][: self.max_length]), ([], [])
        bos = len(self.backend.bos_ids) if plan.segments.bos else 0
        if self.overflow == "truncate_prompt" and len(prefix[0]) - bos >= excess:
            ids, weights = prefix
            return (ids[:bos] + ids[bos + excess :], weights[:bos] + weights[bos + excess :]), rest
        total = len(prefix[0]) + len(rest[0])
        reason = (
            f"of which {len(rest[0])} are not prompt"
            if self.overflow == "truncate_prompt"
            else 'choose overflow="drop", "truncate_prompt" or "truncate"'
        )
        raise DataError(
            f"expected at most {self.max_length} tokens, got {total}; {reason}. "
            "Raise max_length or shorten the row.",
            code="too_long",
        )

    def _empty_target(self, plan: _Plan, *, cut: bool) -> DataError:
        if cut:
            cause = f"the prompt alone fills max_length={self.max_length}"
        elif not any(weight > 0 for weight in plan.weights):
            cause = f"train_on={self.train_on!r:.40} gives every part weight 0"
        elif not any(
            part.text for part, weight in zip(plan.segments.parts, plan.weights, strict=True) if weight > 0
        ):
            cause = "the trained text is empty"
        else:
            cause = "the only trained token is the first one, and no token before it predicts it"
        return DataError(f"expected a trained token, got none: {cause}.", code="empty_target")

    def _stops(self, prefix: Weighted, rest: Weighted) -> bool:
        """Whether the last trained token ends a turn."""
        ids, weights = prefix[0] + rest[0], prefix[1] + rest[1]
        last = next(i for i in range(len(ids) - 1, -1, -1) if weights[i] > 0)
        return ids[last] in self.stop_ids

    def _assert_control(self, plan: _Plan, ids: Sequence[int]) -> None:
        """Control ids come from templates, BOS and EOS alone, and BOS stands at most once at the start."""
        allowed = (
            plan.stretches.control
            + plan.segments.eos
            + (len(self.backend.bos_ids) if plan.segments.bos else 0)
        )
        found = sum(1 for i in ids if i in self.backend.control_ids)
        if found > allowed:
            raise DataError(
                f"expected at most {allowed} control tokens, got {found}: this tokenizer makes control "
                "tokens of ordinary text. Remove such text from the data.",
                code="control_token",
            )
        bos = list(self.backend.bos_ids)
        if bos and list(ids[: 2 * len(bos)]) == bos * 2:
            raise DataError(
                "expected one BOS, got two: the data bring their own. Remove it.", code="double_bos"
            )


def _joined(encoded: Any, count: int) -> Weighted:
    ids: list[int] = []
    weights: list[float] = []
    for _ in range(count):
        piece_ids, piece_weights = next(encoded)
        ids += piece_ids
        weights += piece_weights
    return ids, weights


def _trained(prefix: Weighted, rest: Weighted) -> int:
    """Tokens of weight > 0, but for the first of the sequence, which nothing predicts."""
    return sum(weight > 0 for weight in (prefix[1] + rest[1])[1:])


def _refused(source: str, error: DataError, *, first: bool = True) -> Example:
    file, _, row = source.rpartition(":")
    located = DataError(
        error.message,
        code=error.code,
        file=file,
        row=int(row) if row.isdigit() else None,
        column=error.column,
        byte=error.byte,
        excerpt=error.excerpt,
    )
    return Example(([], []), ([], []), source, first=first, problem=located)
