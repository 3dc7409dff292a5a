"""Few labelled rows: as many of each class to train on as to choose by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from datasets import Dataset

from ftlib.checks import COUNT, INTEGER, TEXT, check
from ftlib.data.instructions.choice import draw
from ftlib.errors import DataError

__all__ = ["few_shot_split"]

Records = TypeVar("Records", Dataset, Sequence[Mapping[str, Any]])


def few_shot_split(records: Records, k: int, *, seed: int = 0, label: str = "label") -> tuple[Any, Any]:
    """`k` rows of each class to train on, and `k` others of each to choose settings by.

    The size of the second is part of what few-shot means: a larger one would be labels that were not
    counted. Repeat with five seeds and report mean and deviation; a single draw says little.

    Args:
        records: a `Dataset`, or dicts.
        k: rows per class on each side, >= 1.
        seed: of the draw, by hash of seed and position.
        label: column of the class.

    Returns:
        (train, dev), of the kind given, rows in their order.

    Raises:
        DataError: a class with fewer than 2 k rows.

    Source: Gao et al. 2021, section 3.

    Example:
        >>> rows = [{"text": str(n), "label": "ab"[n % 2]} for n in range(8)]
        >>> train, dev = few_shot_split(rows, 1)
        >>> sorted(row["label"] for row in train), len(dev)
        (['a', 'b'], 2)
    """
    check("few_shot_split", {"k": (k, COUNT), "seed": (seed, INTEGER), "label": (label, TEXT)})
    if not isinstance(records, Dataset | list | tuple):
        raise DataError(f"few_shot_split: expected a Dataset or a list of dicts, got {records!r:.80}.")
    cells = list(records[label]) if isinstance(records, Dataset) else [row.get(label) for row in records]
    classes: dict[str, list[int]] = {}
    for place, cell in enumerate(cells):
        classes.setdefault(str(cell), []).append(place)
    train, dev = [], []
    for name, places in sorted(classes.items()):
        if len(places) < 2 * k:
            raise DataError(
                f"few_shot_split: expected at least {2 * k} rows of class {name!r} for k={k}, got "
                f"{len(places)}.",
                column=label,
            )
        ranked = sorted(places, key=lambda place: draw(seed, str(place)))
        train += ranked[:k]
        dev += ranked[k : 2 * k]
    if isinstance(records, Dataset):
        return records.select(sorted(train)), records.select(sorted(dev))
    return [records[place] for place in sorted(train)], [records[place] for place in sorted(dev)]
