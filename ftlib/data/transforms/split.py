"""Training and validation sides of a data set, cut between groups and never through one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Literal

from datasets import Dataset

from ftlib.checks import INTEGER, TEXT, check, number
from ftlib.data.transforms.membership import by_class, by_hash, legacy, validation_rows
from ftlib.data.transforms.near import near_duplicates
from ftlib.data.transforms.prompts import asked, prompt_columns, prompt_key, prompt_parts
from ftlib.errors import ConfigError, DataError

__all__ = ["split"]


def split(
    records: Dataset,
    *,
    validation: float = 0.2,
    seed: int = 0,
    group: str = "prompt",
    stratify: str | None = None,
    method: Literal["legacy"] | None = None,
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
            begin with); ``"near"`` also rows whose prompts are near-duplicates of one earlier prompt (see
            `near_duplicates`; system messages are left out); otherwise the column whose equal values stay
            together.
        stratify: the column that holds the class.
        method: ``"legacy"`` repeats the membership of older tools: training is the first part of
            ``RandomState(42).permutation(n)``, in that order. It cuts through groups and knows no classes.

    Raises:
        ConfigError: a share outside (0, 1), or options that `method` does not heed.
        DataError: a column that is absent, or fewer than two groups.
    """
    if not isinstance(records, Dataset):
        raise ConfigError(
            f"split: expected a datasets.Dataset, got {type(records).__name__}, whose end is not known. "
            "Load it with load_records, or cut it with take and skip."
        )
    check(
        "split",
        {
            "validation": (validation, number(above=0, below=1)),
            "seed": (seed, INTEGER),
            "group": (group, TEXT),
            "stratify": (stratify, TEXT.or_none),
        },
    )
    if method is not None:
        return _legacy(records, validation, seed, group, stratify, method)
    groups = _groups(records, group)
    if len(set(groups)) < 2:
        raise DataError(
            f"split: expected at least two groups by {group!r}, got {len(set(groups))} in {len(groups)} "
            "rows. Group by another column, or add rows.",
            code="empty_data",
        )
    if stratify is None:
        held_out = by_hash(groups, validation, seed)
    else:
        held_out = by_class(groups, _column(records, stratify), validation, seed)
    train = [row for row, held in enumerate(held_out) if not held]
    valid = [row for row, held in enumerate(held_out) if held]
    return records.select(train), records.select(valid)


def _legacy(
    records: Dataset, validation: float, seed: int, group: str, stratify: str | None, method: str
) -> tuple[Dataset, Dataset]:
    if method != "legacy":
        raise ConfigError(f'split: expected method as None or "legacy", got {method!r}.')
    given = {"seed": seed != 0, "group": group != "prompt", "stratify": stratify is not None}
    unheeded = [name for name, is_given in given.items() if is_given]
    if unheeded:
        raise ConfigError(
            f'split: method="legacy" does not heed {unheeded}. Leave them out, or leave out method.'
        )
    held_out = validation_rows(len(records), validation)
    if not 0 < held_out < len(records):
        raise DataError(
            f"split: expected rows for both sides, got {len(records)} with validation={validation}. "
            "Add rows.",
            code="empty_data",
        )
    train, valid = legacy(len(records), held_out)
    return records.select(train), records.select(valid)


def _groups(records: Dataset, group: str) -> list[str]:
    """The group of each row."""
    if group not in ("prompt", "near"):
        return [json.dumps(value, sort_keys=True, default=str) for value in _column(records, group)]
    rows = records.select_columns(prompt_columns(records.column_names)).with_format(None)
    keys = [prompt_key(asked(row)) for row in rows]
    if group == "prompt":
        return keys
    return [keys[centre] for centre in near_duplicates(prompt_parts(asked(row)) for row in rows)]


def _column(records: Dataset, name: str) -> Iterable[Any]:
    if name not in records.column_names:
        raise DataError(
            f"split: expected a column {name!r}, found {records.column_names}. Name one of these.",
            code="missing_column",
            column=name,
        )
    values: Iterable[Any] = records.with_format(None)[name]
    return values
