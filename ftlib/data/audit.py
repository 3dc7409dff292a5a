"""Encoded examples that repeat one another, inside a data set and between two.

Examples are compared by token ids, which is what is trained: two rows that a formatter makes alike are
alike.
"""

from __future__ import annotations

import hashlib
import logging
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset

from ftlib.data.examples import Example

__all__ = ["digest", "overlap", "repeated", "warn_of_overlap"]

_log = logging.getLogger(__name__)
_BATCH = 1000  # examples read together
_BYTES = 8


def digest(example: Example) -> int:
    """A number that examples of equal ids, loss weights, labels and other numbers share, int64."""
    state = hashlib.blake2b(digest_size=_BYTES)
    for ids, weights in (example.prefix, *example.continuations):
        state.update(array("q", [len(ids)]))  # tells where a piece ends
        state.update(array("q", ids))
        state.update(array("d", weights))
    for name, numbers in sorted(example.extras.items()):
        state.update(name.encode())
        state.update(array("d", numbers))
    return _number(state.digest())


def repeated(digests: Sequence[int], seen: set[int]) -> int:
    """How many are equal to an earlier one or in `seen`, to which all are added."""
    before = len(seen)
    seen.update(digests)
    return len(digests) - (len(seen) - before)


def overlap(encoded: Dataset, against: Dataset, *, before: int = 0) -> int:
    """Examples of `encoded` whose prompt is the prompt of an example of `against`.

    Args:
        encoded: encoded examples.
        against: encoded examples of other data, by the same encoder.
        before: tokens that the tokenizer puts before any text. Where a prompt holds no others, all of the
            example counts in its place.
    """
    known = set(_prompts(against, before))
    return sum(prompt in known for prompt in _prompts(encoded, before))


def warn_of_overlap(train: Any, held_out: Any) -> None:
    """Log how many prompts of the data that a run is measured on are trained on, too, if any are.

    Args:
        train: encoded examples; nothing is compared unless both are data sets of them.
        held_out: likewise.
    """
    both = (train, held_out)
    if not all(isinstance(data, Dataset) and "continuation_ids" in data.column_names for data in both):
        return
    shared = overlap(held_out, train, before=1)
    if shared:
        _log.warning(
            "%d of %d evaluation examples have a prompt (of texts: all) that is trained on, too: their loss "
            "tells what was memorised. ft.split keeps rows of one prompt on one side.",
            shared,
            len(held_out),
        )


def _prompts(encoded: Dataset, before: int) -> Iterator[int]:
    columns = encoded.select_columns(["prefix_ids", "continuation_ids"]).with_format("arrow")
    for start in range(0, len(columns), _BATCH):
        table = columns[start : start + _BATCH]
        for prefix, rest in zip(table["prefix_ids"], table["continuation_ids"], strict=True):
            ids = prefix.values.to_numpy() if len(prefix) > before else rest.values.flatten().to_numpy()
            yield _number(hashlib.blake2b(ids.tobytes(), digest_size=_BYTES).digest())


def _number(digest: bytes) -> int:
    return int.from_bytes(digest, "little", signed=True)
