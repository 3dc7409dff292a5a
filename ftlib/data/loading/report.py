"""What became of the rows of a source, kept with the records in their `info.description`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, final

from datasets import Dataset, IterableDataset

from ftlib.errors import ConfigError

__all__ = ["LoadReport", "load_report"]


@final
@dataclass(frozen=True)
class LoadReport:
    """Rows in = `used` + `dropped` + `rejected`.

    Args:
        format: the rule that was used, ``rows`` or ``mixed``.
        columns: canonical name -> name in the source, as given.
        rows: rows of the source; blank lines of plain text are none.
        used: rows that became records.
        records: records; more than `used` where rows hold several, fewer where records are gathered.
        dropped: reason -> rows that their own data say to leave out.
        rejected: bad rows that were skipped.
        rejected_file: where they stand, with their reasons.
        looked_at: rows that decided the format; 0 where it was named.
        fits: rule -> how many of these it fits.
        ignored: columns that another format would have read.
        moved: columns kept aside, because their names mean something in another format.
        notes: what else was met, by name.
    """

    format: str
    rows: int
    used: int
    records: int
    columns: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    rejected: int = 0
    rejected_file: str | None = None
    looked_at: int = 0
    fits: Mapping[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        accounted = self.used + sum(self.dropped.values()) + self.rejected
        if accounted != self.rows:
            raise AssertionError(f"load_records: {self.rows} rows came in, {accounted} are accounted for.")

    def __str__(self) -> str:
        parts = [f"{self.records} records of {self.rows} rows, read as {self.format}"]
        if self.looked_at:
            parts.append(f"which fits {self.fits.get(self.format, 0)} of {self.looked_at} rows looked at")
        parts += [f"{name}, which comes first, fits {self.fits[name]} of them" for name in self.nearly]
        parts += [f"dropped {count}: {reason}" for reason, count in self.dropped.items()]
        if self.rejected:
            where = "" if self.rejected_file is None else f", see {self.rejected_file}"
            parts.append(f"rejected {self.rejected}{where}")
        if self.ignored:
            parts.append(f"ignored: {', '.join(self.ignored)}")
        if self.moved:
            parts.append(f"kept aside: {', '.join(self.moved)}")
        parts += [f"{count} {name}" for name, count in self.notes.items() if count]
        return "; ".join(parts)

    @property
    def nearly(self) -> tuple[str, ...]:
        """Rules that come before the one used, and fit most rows looked at but not all."""
        names = list(self.fits)
        earlier = names[: names.index(self.format)] if self.format in names else []
        return tuple(name for name in earlier if self.fits[name] * 2 > self.looked_at)

    @property
    def is_notable(self) -> bool:
        """Whether something happened that a reader of the log should see."""
        happened = self.dropped or self.rejected or self.ignored or self.moved or self.nearly
        return bool(happened or any(self.notes.values()))

    def attached(self, records: Dataset) -> Dataset:
        """`records`, which now carry this report."""
        records.info.description = json.dumps({_KEY: asdict(self)}, ensure_ascii=False)
        return records


_KEY = "ftlib.load_records"


def load_report(records: Dataset) -> LoadReport:
    """The report of records that `load_records` made.

    Raises:
        ConfigError: records that carry none.
    """
    if not isinstance(records, Dataset | IterableDataset):
        raise ConfigError(f"load_report: expected what load_records gives, got {records!r:.80}.")
    try:
        found: Any = json.loads(records.info.description)[_KEY]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "load_report: expected records as load_records gives them, got a data set without its report."
        ) from error
    return LoadReport(**{**found, "ignored": tuple(found["ignored"]), "moved": tuple(found["moved"])})
