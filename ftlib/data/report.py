"""What the encoder did, counted: nothing is dropped, cut or added without an entry here."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, final

__all__ = ["Report"]

DROPPED = "examples dropped"


@final
@dataclass
class Report:
    """Counts of one call of the encoder.

    Args:
        rows: input rows.
        examples: encoded examples that came out.
        tokens: tokens of these, each prefix once.
        trained_tokens: tokens of weight > 0 that have a token before them to predict them.
        answers: continuations of examples that compare several.
        pairs: pairs of these of which one is better.
        dropped: reason -> examples left out.
        truncated: examples cut to `max_length`.
        without_terminator: examples whose last trained token is no stop token.
        split_turns: examples gained where a conversation became one example per trained turn.
        control_text: examples in which people's text holds control tokens, kept as text.
        stop_added: examples whose template left the last turn without a stop token; EOS was added.
        system_from_template: examples with a system text of the template's own.
        system_added: examples that got the formatter's system text.
        duplicates: examples of the same ids, weights and labels as an earlier one.
        overlap: examples whose prompt (of texts: all) stands in the data they were held against, too;
            `None`: against none.
    """

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    answers: int = 0
    pairs: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    without_terminator: int = 0
    split_turns: int = 0
    control_text: int = 0
    stop_added: int = 0
    system_from_template: int = 0
    system_added: int = 0
    duplicates: int = 0
    overlap: int | None = None

    @property
    def trained_share(self) -> float:
        """Trained tokens over all tokens, 0 to 1; 0 without tokens."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0

    def add(
        self,
        *,
        length: int,
        trained: int,
        answers: int,
        pairs: int,
        dropped: str | None,
        notes: list[str],
        first: bool,
    ) -> None:
        """Count one example. `first`: it is the first of its row; `notes`: names of the counters above."""
        self.rows += first
        self.split_turns += not first
        if dropped is not None:
            self.dropped[dropped] += 1
            return
        self.examples += 1
        self.tokens += length
        self.trained_tokens += trained
        self.answers += answers
        self.pairs += pairs
        for note in notes:
            setattr(self, note, getattr(self, note) + 1)

    def check(self) -> None:
        """Raise AssertionError unless every row is accounted for."""
        came, went = self.rows + self.split_turns, self.examples + self.dropped.total()
        if came != went:
            raise AssertionError(f"encoder: {came} examples came in, {went} are accounted for.")

    def flags(self) -> list[str]:
        """What deserves a look before training, in words."""
        whole = self.examples + self.dropped.total()
        return [
            f"{count:,} of {whole if what == DROPPED else self.examples:,} {what}"
            for what, count in self.red_flags().items()
        ]

    def red_flags(self) -> dict[str, int]:
        """Kind of flag, in words -> the examples that it concerns; at least one."""
        counts = {
            "examples without a trained stop token": self.without_terminator,
            "examples whose text holds control tokens, kept as text": self.control_text,
            DROPPED: self.dropped.total(),
            "examples truncated": self.truncated,
            "examples that repeat an earlier one": self.duplicates,
            "examples whose prompt stands in the other data, too": self.overlap,
        }
        return {what: count for what, count in counts.items() if count}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "dropped": dict(self.dropped), "trained_share": self.trained_share}

    def __str__(self) -> str:
        compared = f" ({self.answers:,} answers, {self.pairs:,} pairs)" if self.pairs else ""
        lines = [
            (
                f"{self.rows:,} rows -> {self.examples:,} examples{compared}, {self.tokens:,} tokens, "
                f"{self.trained_tokens:,} trained ({self.trained_share:.0%})"
            )
        ]
        shown = self.to_dict()
        lines += [
            f"  {name.replace('_', ' ')}: {shown[name]:,}"
            for name in (
                "truncated",
                "without_terminator",
                "split_turns",
                "control_text",
                "stop_added",
                "system_from_template",
                "system_added",
                "duplicates",
                "overlap",
            )
            if shown[name]
        ]
        lines += [f"  dropped, {reason}: {count:,}" for reason, count in sorted(self.dropped.items())]
        return "\n".join(lines)
