"""What a transform did, counted: every row that came in came out or has a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

from datasets import Dataset, IterableDataset

__all__ = ["SHOWN", "Records", "Step", "TransformReport", "Transformed"]

Records = Dataset | IterableDataset

SHOWN = 20  # rows named per reason; the rest are counted


@final
@dataclass
class Step:
    """Counts of one transform. Of a stream they grow as it is read.

    Args:
        name: the transform.
        rows: rows that came in.
        kept: rows that came out.
        dropped: reason -> rows left out.
        added: reason -> rows that came out beyond those that came in.
        counts: what else was seen, by name.
        examples: reason -> the first 20 rows of it, each as ``file:row`` with what it was held against.
    """

    name: str
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    added: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str | None) -> bool:
        """Count one row, dropped for `reason` or kept for `None`; returns whether it is kept."""
        self.rows += 1
        if reason is None:
            self.kept += 1
        else:
            self.dropped[reason] += 1
        return reason is None

    def show(self, reason: str, example: str) -> None:
        """Name one row of `reason`, if not 20 are named already."""
        shown = self.examples.setdefault(reason, [])
        if len(shown) < SHOWN:
            shown.append(example)

    def restart(self) -> None:
        """Back to zero, where a stream is read again from its start."""
        vars(self).update(vars(Step(self.name)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(self).items()}

    def __str__(self) -> str:
        more = [
            *(f"dropped, {reason}: {count:,}" for reason, count in sorted(self.dropped.items())),
            *(f"added, {reason}: {count:,}" for reason, count in sorted(self.added.items())),
            *(f"{name}: {count:,}" for name, count in sorted(self.counts.items())),
        ]
        return "\n".join(
            [f"{self.name}: {self.rows:,} rows -> {self.kept:,}", *(f"  {line}" for line in more)]
        )


@final
@dataclass(frozen=True)
class TransformReport:
    """The steps that made a data set, in order; one for a single transform, several for a pipeline."""

    steps: tuple[Step, ...]

    @property
    def rows(self) -> int:
        """Rows that came into the first step."""
        return self.steps[0].rows

    @property
    def kept(self) -> int:
        """Rows that came out of the last step."""
        return self.steps[-1].kept

    @property
    def dropped(self) -> Counter[str]:
        """Reason -> rows left out, over all steps."""
        return _sum(step.dropped for step in self.steps)

    @property
    def added(self) -> Counter[str]:
        """Reason -> rows that came out beyond those that came in, over all steps."""
        return _sum(step.added for step in self.steps)

    def check(self) -> None:
        """Raise AssertionError unless every row is accounted for."""
        came, went = self.rows + self.added.total(), self.kept + self.dropped.total()
        if came != went:
            raise AssertionError(f"transforms: {came} rows came in, {went} are accounted for.\n{self}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "rows": self.rows,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "added": dict(self.added),
            "steps": [step.to_dict() for step in self.steps],
        }

    def __str__(self) -> str:
        return "\n".join(map(str, self.steps))


class Transformed(NamedTuple):
    """What every transform returns: the records, of the kind that came in, and the report."""

    records: Any
    report: TransformReport


def _sum(counters: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return total
