"""Training and validation sides of a data set, cut between groups and never through one.

Left out: near-duplicate groups (`group="near"`) and the membership of older tools.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from datasets import Dataset

from ftlib.data.preferences import leading
from ftlib.errors import ConfigError, DataError

__all__ = ["normalise", "split"]

_log = logging.getLogger(__name__)
_PROMPTS = ("prompt", "messages", "text")  # what stands for the prompt, in this order
_HASH_BYTES = 8


def split(
    records: Dataset,
    *,
    validation: float = 0.2,
    seed: int = 0,
    group: str = "prompt",
    stratify: str | None = None,
) -> tuple[Dataset, Dataset]:
    """Training and validation records, each in input order.

    Without `stratify`, a group goes to validation if ``u(blake2b(seed, group)) < validation``: the
    share is met on average, and rows appended later move no earlier row. A side that would be empty
    takes the nearest group, which is logged.

    With `stratify`, classes get validation rows by largest remainder, in whole groups; every class
    with two groups or more is present on both sides.

    Args:
        records: canonical records.
        validation: share of validation, between 0 and 1.
        seed: any integer.
        group: ``"prompt"`` keeps rows of one normalised prompt together (for `messages`, the turns
            before the first answer; for `text`, the text; for pairs without a prompt, the words that both
            begin with); otherwise the column whose equal values stay together.
        stratify: the column that holds the class.

    Raises:
        ConfigError: a share outside (0, 1).
        DataError: a column that is absent, or fewer than two groups.
    """
    if not 0.0 < validation < 1.0:
        raise ConfigError(f"split: expected 0 < validation < 1, got {validation}.")
    keys = _keys(records, group)
    if len(set(keys)) < 2:
        raise DataError(
            f"split: expected at least two groups by {group!r}, got {len(set(keys))} in {len(keys)} rows. "
            "Group by another column, or add rows.",
            code="empty_data",
        )
    places = {key: _place(key, seed) for key in keys}
    if stratify is None:
        chosen = _by_hash(places, validation)
    else:
        chosen = _by_class(keys, places, _column(records, stratify), validation)
    train = [row for row, key in enumerate(keys) if key not in chosen]
    valid = [row for row, key in enumerate(keys) if key in chosen]
    return records.select(train), records.select(valid)


def normalise(text: str) -> str:
    r"""Text for comparing prompts: NFKC, casefolded, punctuation and blanks to one blank, trimmed.

    Example:
        >>> normalise("  What's  NEW?")
        'what s new'
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(
        "".join(" " if unicodedata.category(char)[0] in "PZC" else char for char in folded).split()
    )


def _keys(records: Dataset, group: str) -> list[str]:
    """The group of each row."""
    if group != "prompt":
        return [json.dumps(value, sort_keys=True, default=str) for value in _column(records, group)]
    if {"chosen", "rejected"} <= set(records.column_names):
        asked = records.select_columns(
            [name for name in ("prompt", "chosen", "rejected") if name in records.column_names]
        )
        return [_prompt_key(_asked(row)) for row in asked.with_format(None)]
    name = next((name for name in _PROMPTS if name in records.column_names), None)
    if name is None:
        raise _absent("prompt", records)
    return [_prompt_key(value) for value in _column(records, name)]


def _asked(row: Mapping[str, Any]) -> str | Sequence[Mapping[str, Any]]:
    """The prompt of a pair, or what both sides begin with: whole words, whole messages."""
    if row.get("prompt") is not None:
        prompt: str | Sequence[Mapping[str, Any]] = row["prompt"]
        return prompt
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(chosen, str):
        return leading(chosen, rejected)
    common = "".join(leading(chosen, rejected))
    return common[: max((at for at, char in enumerate(common) if char.isspace()), default=0)]


def _prompt_key(value: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(value, str):
        return normalise(value)
    turns = []
    for message in value:
        if message["role"] == "assistant":
            break
        turns.append([message["role"], normalise(str(message.get("content") or ""))])
    return json.dumps(turns, ensure_ascii=False)


def _column(records: Dataset, name: str) -> Iterable[Any]:
    if name not in records.column_names:
        raise _absent(name, records)
    values: Iterable[Any] = records.with_format(None)[name]
    return values


def _absent(name: str, records: Dataset) -> DataError:
    return DataError(
        f"split: expected a column {name!r}, found {records.column_names}. Name one of these.",
        code="missing_column",
        column=name,
    )


def _place(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on the seed and the group alone."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=_HASH_BYTES).digest()
    return int.from_bytes(digest, "big") / float(256**_HASH_BYTES)


def _by_hash(places: Mapping[str, float], validation: float) -> set[str]:
    chosen = {key for key, place in places.items() if place < validation}
    if not chosen:
        chosen = {min(places, key=lambda key: (places[key], key))}
        _log.warning("split: no group fell to validation; it takes the nearest one.")
    elif len(chosen) == len(places):
        chosen.remove(max(places, key=lambda key: (places[key], key)))
        _log.warning("split: every group fell to validation; training takes the nearest one.")
    return chosen


def _by_class(
    keys: Sequence[str], places: Mapping[str, float], labels: Iterable[Hashable], validation: float
) -> set[str]:
    """Whole groups whose rows come nearest to each class's quota, in the order of their hashes."""
    counts: dict[str, Counter[Hashable]] = defaultdict(Counter)
    for key, label in zip(keys, labels, strict=True):
        counts[key][label] += 1
    # A group counts to its most frequent label; equal counts go to the label that sorts first.
    of_class: dict[Hashable, list[str]] = defaultdict(list)
    for key, counter in counts.items():
        of_class[min(counter, key=lambda label: (-counter[label], str(label)))].append(key)
    sizes = {key: counter.total() for key, counter in counts.items()}
    rows = {label: sum(sizes[key] for key in members) for label, members in of_class.items()}
    quotas = _largest_remainder(rows, validation)
    chosen: set[str] = set()
    for label in sorted(of_class, key=str):
        ranked = sorted(of_class[label], key=lambda key: (places[key], key))
        take = _nearest([sizes[key] for key in ranked], quotas[label])
        if len(ranked) > 1:  # both sides see the class
            take = min(max(take, 1), len(ranked) - 1)
        chosen.update(ranked[:take])
    if not chosen or len(chosen) == len(keys):
        raise DataError(
            "split: expected a class with at least two groups, got classes of one group each. "
            "Leave out stratify, or group by another column.",
            code="empty_data",
        )
    return chosen


def _largest_remainder(rows: Mapping[Hashable, int], validation: float) -> dict[Hashable, int]:
    """Validation rows per class; together n - floor((1 - validation) * n). Ties by sorted label."""
    share = Fraction(str(validation))  # 0.1 as written, not as the nearest binary fraction
    total = sum(rows.values()) - math.floor((1 - share) * sum(rows.values()))
    quotas = {label: math.floor(count * share) for label, count in rows.items()}
    by_remainder = sorted(rows, key=lambda label: (quotas[label] - rows[label] * share, str(label)))
    for label in by_remainder[: total - sum(quotas.values())]:
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
