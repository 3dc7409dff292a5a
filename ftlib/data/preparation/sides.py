"""Training and validation rows of classification data."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from ftlib.data.preparation.intake import Intake
from ftlib.data.preparation.scan import Scan
from ftlib.data.preparation.settings import Settings, SplitMethod
from ftlib.data.preparation.table import Table
from ftlib.data.transforms import near_duplicates
from ftlib.data.transforms.membership import by_class, legacy, validation_rows
from ftlib.data.transforms.normalise import normalise

__all__ = ["Sides", "divide"]

_SHARE, _MOST = 0.2, 1000  # of validation rows, unless the user names a share

Rows = NDArray[np.int64]


@final
@dataclass(frozen=True, eq=False)
class Sides:
    """A split.

    Args:
        method: how it was made.
        train: rows of the spool, in the order in which they are written.
        valid: likewise.
        per_class: rows of training and of validation, by label.
        shared_prompts: prompts, normalised, that stand on both sides.
    """

    method: SplitMethod
    train: Rows
    valid: Rows
    per_class: dict[str, tuple[int, int]]
    shared_prompts: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "method": self.method,
            "sizes": {"train": len(self.train), "valid": len(self.valid)},
            "per_class": {label: list(counts) for label, counts in self.per_class.items()},
            "shared_prompts": self.shared_prompts,
        }


def divide(table: Table, intake: Intake, scan: Scan, settings: Settings) -> Sides:
    """The sides of a table whose completions are labels.

    Raises:
        DataError: no class has two groups.
    """
    count = len(table)
    share = settings.validation
    held_out = min(_MOST, validation_rows(count, _SHARE)) if share is None else validation_rows(count, share)
    pool: dict[str, str] = {}  # one object per label, not one per row
    labels = [pool.setdefault(row.completion, row.completion) for row in table.rows()]
    if settings.split_method == "legacy":
        train, valid = (np.array(side, dtype=np.int64) for side in legacy(count, held_out))
    else:
        groups = list(_groups(table, intake, settings.group or "prompt"))
        is_valid = np.array(by_class(groups, labels, Fraction(held_out, count), settings.seed or 0))
        train, valid = np.flatnonzero(~is_valid), np.flatnonzero(is_valid)
    per_class: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for side, rows in enumerate((train, valid)):
        for row in rows.tolist():
            per_class[labels[row]][side] += 1
    keys = np.array(scan.prompt_keys, dtype=np.int64)
    shared = np.setdiff1d(np.intersect1d(keys[train], keys[valid]), [0])
    return Sides(
        settings.split_method,
        table.indices[train],
        table.indices[valid],
        {label: (per_class[label][0], per_class[label][1]) for label in sorted(per_class)},
        len(shared),
    )


def _groups(table: Table, intake: Intake, group: str) -> Iterator[str]:
    """A short name of the group of each row; it depends on the data alone, not on the process."""
    if group == "prompt":
        for row in table.rows():
            yield _short(normalise(row.prompt))
    elif group == "near":
        centres = near_duplicates((row.prompt for row in table.rows()), folder=intake.spool.folder)
        names = [_short(normalise(row.prompt)) for row in table.rows()]
        for centre in centres.tolist():
            yield names[centre]
    else:
        yield from map(str, np.array(intake.groups, dtype=np.int64)[table.kept].tolist())


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
