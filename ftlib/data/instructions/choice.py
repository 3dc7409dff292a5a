"""Choices that depend on a seed and a row alone: not on workers, order or other rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from ftlib.data.segments import Row

__all__ = ["draw", "row_id"]

_IDS = ("id", "_id", "Id", "ID")


def draw(seed: int, key: str) -> int:
    """A number of 64 bits, the same for the same seed and key everywhere."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest(), "big")


def row_id(row: Row, columns: Iterable[str]) -> str:
    """What stands for a row in `draw`: its `id`, or the text of `columns`, those of the prompt.

    Example:
        >>> row_id({"id": 7, "question": "why?"}, ["question"])
        '7'
        >>> row_id({"question": "why?", "answer": "so"}, ["question"])
        '[["question", "why?"]]'
    """
    for name in _IDS:
        if row.get(name) is not None:
            return str(row[name])
    found: list[tuple[str, Any]] = sorted(
        (name, row[name]) for name in set(columns) if row.get(name) is not None
    )
    return json.dumps(found, ensure_ascii=False, sort_keys=True, default=str)
