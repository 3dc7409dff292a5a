"""Which rows are validation, from their groups and classes alone.

A group is any string that its rows share; groups are never cut. Everything is a pure function of its
arguments, so the same groups fall on the same side in every process.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from fractions import Fraction

import numpy as np

from ftlib.errors import DataError

__all__ = ["by_class", "by_hash", "legacy", "place", "validation_rows"]

_log = logging.getLogger(__name__)
_HASH_BYTES = 8
_LEGACY_SEED = 42

Share = float | Fraction


def place(group: str, seed: int) -> float:
    """A number in [0, 1) that depends on the seed and the group alone."""
    digest = hashlib.blake2b(f"{seed}\0{group}".encode(), digest_size=_HASH_BYTES).digest()
    return int.from_bytes(digest, "big") / float(256**_HASH_BYTES)


def by_hash(groups: Sequence[str], validation: Share, seed: int) -> list[bool]:
    """Groups whose `place` is below `validation`. Rows appended later move no earlier row.

    A side that would be empty takes the nearest group, which is logged.

    Args:
        groups: the group of each row, two different ones at least.
        validation: share of validation, between 0 and 1; met on average.
        seed: any integer.

    Returns:
        For each row, whether it is validation.
    """
    places = {group: place(group, seed) for group in groups}
    chosen = {group for group, where in places.items() if where < validation}
    if not chosen:
        chosen = {min(places, key=lambda group: (places[group], group))}
        _log.warning("split: no group fell to validation; it takes the nearest one.")
    elif len(chosen) == len(places):
        chosen.remove(max(places, key=lambda group: (places[group], group)))
        _log.warning("split: every group fell to validation; training takes the nearest one.")
    return [group in chosen for group in groups]


def by_class(groups: Sequence[str], labels: Iterable[Hashable], validation: Share, seed: int) -> list[bool]:
    """Validation rows per class by largest remainder, in whole groups.

    A class takes its groups in the order of their `place`, as many as come nearest to its rows (of two
    numbers, the larger). Every class of two groups or more is on both sides.

    Args:
        groups: the group of each row.
        labels: the class of each row; a group counts to its most frequent one.
        validation: share of validation, between 0 and 1; ``Fraction(k, n)`` asks for k of n rows.
        seed: any integer.

    Returns:
        For each row, whether it is validation.

    Raises:
        DataError: no class has two groups.
    """
    counts: dict[str, Counter[Hashable]] = defaultdict(Counter)
    for group, label in zip(groups, labels, strict=True):
        counts[group][label] += 1
    # Equal counts go to the label that sorts first.
    of_class: dict[Hashable, list[str]] = defaultdict(list)
    for group, counter in counts.items():
        of_class[min(counter, key=lambda label: (-counter[label], str(label)))].append(group)
    sizes = {group: counter.total() for group, counter in counts.items()}
    rows = {label: sum(sizes[group] for group in members) for label, members in of_class.items()}
    several = {label for label, members in of_class.items() if len(members) > 1}
    quotas = _largest_remainder(rows, validation, several)
    chosen: set[str] = set()
    for label in sorted(of_class, key=str):
        ranked = sorted(of_class[label], key=lambda group: (place(group, seed), group))
        take = _nearest([sizes[group] for group in ranked], quotas[label])
        if len(ranked) > 1:  # both sides see the class
            take = min(max(take, 1), len(ranked) - 1)
        chosen.update(ranked[:take])
    if not chosen or len(chosen) == len(counts):
        raise DataError(
            "split: expected a class with at least two groups, got classes of one group each. "
            "Leave out stratify, or group by another column.",
            code="empty_data",
        )
    return [group in chosen for group in groups]


def legacy(rows: int, held_out: int) -> tuple[list[int], list[int]]:
    """The rows of training and of validation as older tools drew them, groups and classes unseen.

    Args:
        rows: how many there are.
        held_out: how many of them are validation.

    Returns:
        Training rows in the order of ``RandomState(42).permutation(rows)``, whose first they are; the rest
        ascending.
    """
    # The point is to repeat what was drawn with this generator.
    drawn = np.random.RandomState(_LEGACY_SEED).permutation(rows).tolist()
    train = drawn[: rows - held_out]
    return train, sorted(drawn[rows - held_out :])


def validation_rows(rows: int, validation: Share) -> int:
    """Rows of validation: ``rows - floor((1 - validation) * rows)``, the share taken as written.

    Example:
        >>> validation_rows(10, 0.1), 10 - int((1 - 0.1) * 10)
        (1, 1)
    """
    return rows - math.floor((1 - _as_written(validation)) * rows)


def _as_written(share: Share) -> Fraction:
    """0.1 as one tenth, not as the nearest binary fraction."""
    return share if isinstance(share, Fraction) else Fraction(str(share))


def _largest_remainder(
    rows: Mapping[Hashable, int], validation: Share, several: set[Hashable]
) -> dict[Hashable, int]:
    """Validation rows per class. Ties by sorted label.

    They add up to `validation_rows`, unless that is too few for one row of each class in `several`.
    """
    share = _as_written(validation)
    total = validation_rows(sum(rows.values()), share)
    quotas = {label: max(math.floor(count * share), int(label in several)) for label, count in rows.items()}
    by_remainder = sorted(rows, key=lambda label: (quotas[label] - rows[label] * share, str(label)))
    for label in by_remainder[: max(0, total - sum(quotas.values()))]:
        quotas[label] += 1
    return quotas


def _nearest(sizes: Sequence[int], quota: int) -> int:
    """How many leading groups hold a number of rows nearest to `quota`; of two, the larger."""
    best, total, distance = 0, 0, quota
    for taken, size in enumerate(sizes, start=1):
        total += size
        if abs(total - quota) <= distance:
            best, distance = taken, abs(total - quota)
    return best
