"""What becomes of rows as they are converted, every one of them accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from ftlib.data.formats import Dropped
from ftlib.data.loading.convert import Converter
from ftlib.data.loading.report import LoadReport
from ftlib.data.reading import Located
from ftlib.errors import DataError

__all__ = ["Outcome"]


@final
@dataclass
class Outcome:
    """Records, and rows that became none.

    Args:
        rows: rows of the source.
        used: rows that became records.
        records: the records, in order.
        dropped: reason -> rows that are left out by what they say themselves.
        rejects: bad rows, with what is wrong.
    """

    rows: int
    used: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    rejects: list[tuple[Located, DataError]] = field(default_factory=list)

    def add(self, row: Located, convert: Converter) -> None:
        """Convert one row, and count it."""
        try:
            made = convert(row)
        except DataError as error:
            self.rejects.append((row, error))
            return
        if isinstance(made, Dropped):
            self.dropped[made.reason] += 1
        else:
            self.used += 1
            self.records += made

    def report(
        self, convert: Converter, notes: Mapping[str, int], rejected_file: Path | None = None
    ) -> LoadReport:
        """The account.

        Raises:
            AssertionError: rows that are not accounted for.
        """
        choice = convert.choice
        return LoadReport(
            format=choice.name,
            rows=self.rows,
            used=self.used,
            records=len(self.records),
            columns=dict(convert.columns),
            dropped=dict(self.dropped),
            rejected=len(self.rejects),
            rejected_file=None if rejected_file is None else str(rejected_file),
            looked_at=choice.looked_at,
            fits=choice.fits,
            ignored=choice.ignored,
            moved=tuple(sorted(convert.moved)),
            notes={name: count for name, count in sorted(notes.items()) if count},
        )
