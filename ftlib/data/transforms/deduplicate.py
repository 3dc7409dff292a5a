"""The first row of each kind, later ones left out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from datasets import Dataset, IterableDataset

from ftlib.checks import TEXT, check, listed
from ftlib.data.transforms.near import near_duplicates
from ftlib.data.transforms.normalise import normalise
from ftlib.data.transforms.prompts import SAYING, parts, texts
from ftlib.data.transforms.report import Records, Step, Transformed
from ftlib.data.transforms.rows import Row, Verdict, judged, refuse_others, row_name, taken_out
from ftlib.errors import ConfigError, DataError

__all__ = ["deduplicate"]

Match = Literal["exact", "normalised", "near"]

_REASON = "duplicate"
_CANONICAL = (*SAYING, "segments", "input_ids")
# What changes the meaning of canonical columns.
_BESIDE = ("answer", "label", "labels", "tools", "margin", "ranks", "scores", "loss_weights")


def deduplicate(
    records: Records, *, match: Match = "exact", columns: Sequence[str] | None = None
) -> Transformed:
    """Records without those that repeat an earlier one.

    Args:
        records: canonical records. Of a stream, 16 bytes per distinct row are remembered.
        match: ``"exact"``: equal values. ``"normalised"``: equal but for case, punctuation and blanks, so
            ``-1`` repeats ``1``. ``"near"``: prompt plus completion are near-duplicates (see
            `near_duplicates`) of the first row of a cluster; system messages are left out, and rows of
            different system text, label or rejected answers are no duplicates.
        columns: what is compared; `None` takes the canonical columns, or all if there are none.

    Returns:
        Records and report; its examples name each row and what it repeats.

    Raises:
        ConfigError: an unknown match; ``"near"`` on a stream, whose rows cannot be read twice; a stream of
            several shards.
        DataError: ``missing_column``.
    """
    refuse_others("deduplicate", records)
    if match not in get_args(Match):
        raise ConfigError(f"deduplicate: expected match as one of {list(get_args(Match))}, got {match!r}.")
    check("deduplicate", {"columns": (columns, listed("names of columns", TEXT.holds, least=1).or_none)})
    if columns is not None and records.column_names is not None:
        _require(columns, records.column_names)
    step = Step("deduplicate")
    if match != "near":
        verdict = _repeats(step, columns, normalise if match == "normalised" else str)
    elif isinstance(records, IterableDataset):
        raise ConfigError(
            'deduplicate: match="near" looks at all rows before it leaves one out, which a stream cannot. '
            'Load the data, or use match="normalised".'
        )
    else:
        verdict = _resembles(records, step, columns)
    named = None if columns is None else list(columns)
    return judged(records, verdict, step, (match, named), whole=True)


def _repeats(step: Step, columns: Sequence[str] | None, as_compared: Callable[[str], str]) -> Verdict:
    first: dict[bytes, int] = {}

    def verdict(row: Row, index: int) -> str | None:
        if index == 0:
            first.clear()
        compared = {name: _compared(row.get(name), as_compared) for name in columns or _identity(row)}
        text = json.dumps(compared, sort_keys=True, default=str).encode()
        place = first.setdefault(hashlib.blake2b(text, digest_size=16).digest(), index)
        return _shown(step, row, index, place)

    return verdict


def _resembles(records: Dataset, step: Step, columns: Sequence[str] | None) -> Verdict:
    rows = (taken_out(row) for row in records.with_format(None))
    centres = near_duplicates(
        parts(row) if columns is None else [("", "\n".join(texts(row, columns)))] for row in rows
    )
    return lambda row, index: _shown(step, row, index, int(centres[index]))


def _shown(step: Step, row: Row, index: int, place: int) -> str | None:
    if place == index:
        return None
    step.show(_REASON, f"{row_name(row, index)} repeats row {place + 1}")
    return _REASON


def _identity(row: Row) -> list[str]:
    """The columns that make a row what it is."""
    canonical = [name for name in _CANONICAL if name in row]
    if not canonical:
        return [name for name in row if name != "_source"]
    return [*canonical, *(name for name in _BESIDE if name in row)]


def _compared(value: Any, as_compared: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return as_compared(value)
    if isinstance(value, Mapping):
        return {name: _compared(item, as_compared) for name, item in value.items()}
    if isinstance(value, list):
        return [_compared(item, as_compared) for item in value]
    return value


def _require(columns: Sequence[str], found: Sequence[str]) -> None:
    missing = [name for name in columns if name not in found]
    if missing:
        raise DataError(
            f"deduplicate: expected the columns {missing}, found {list(found)}. Name some of these.",
            code="missing_column",
            column=missing[0],
        )
