"""Near-duplicates among many texts: MinHash finds candidates, the true Jaccard similarity decides.

Clusters are stars round their earliest text: a text joins the earliest centre that it resembles, and is
never joined through a third text, so that chains of small changes do not grow into one cluster (as happens
where pairs are closed transitively).

Signatures and shingles stand in a temporary folder while the clusters are found. Memory holds some tens of
bytes per text, and of the texts that may have a near-duplicate a tenth of their shingles.

Shapes: n texts, H = 128 hashes of a signature, S shingles.
"""

from __future__ import annotations

import math
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from os import PathLike
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from ftlib.data.transforms.shingles import Shingles, Text, mixed, shingles
from ftlib.errors import ConfigError

__all__ = ["jaccard", "near_duplicates", "signatures"]

_HASHES = 128
_MISSED = 1e-3  # the share of pairs at the threshold that may share no band
_SLACK = 0.2  # six standard deviations of a signature's estimate of the similarity
_BATCH = 2**14  # shingles hashed together
_CHUNK = 2**16  # signatures read together
_SLOTS = 2**22  # at most, of the table that tells rare shingles from frequent ones

Centres = NDArray[np.int64]


def near_duplicates(
    texts: Iterable[Text], *, threshold: float = 0.9, folder: str | PathLike[str] | None = None
) -> Centres:
    """The centre of each text's cluster: the earliest text that it is a near-duplicate of, or itself.

    Two texts are near-duplicates when the Jaccard similarity of their `shingles` is at least `threshold`.
    Texts that differ in case, punctuation and blanks alone have the same shingles. Of pairs just at the
    threshold about one in 10,000 is overlooked (one in 1,000 at worst); farther above it, ever fewer.

    Args:
        texts: read once, in order.
        threshold: similarity from which on texts count as near-duplicates, above 0, at most 1.
        folder: where the temporary files go; `None` leaves it to the system. They are deleted at the end.

    Returns:
        int64 [n], indices of texts; a centre's is its own.

    Raises:
        ConfigError: a threshold outside (0, 1].

    Source: Broder 1997 (MinHash); Leskovec, Rajaraman, Ullman 2014, §3.4 (bands).

    Example:
        >>> near_duplicates(["A cat sat here.", "No dog.", "a cat sat here"]).tolist()
        [0, 1, 0]
    """
    if not 0.0 < threshold <= 1.0:
        raise ConfigError(f"near_duplicates: expected 0 < threshold <= 1, got {threshold}.")
    with tempfile.TemporaryDirectory(prefix="near-duplicates-", dir=folder) as place:
        store = _stored(texts, Path(place))
        return np.arange(0) if store is None else _stars(store, Fraction(str(threshold)))


def jaccard(one: Shingles, other: Shingles) -> Fraction:
    """What two sets share over what they hold together; both ascending, each number once."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return Fraction(shared, len(one) + len(other) - shared)


def signatures(sets: list[Shingles]) -> NDArray[np.uint32]:
    """The MinHash signature of each set, uint32 [n, H]: the share of equal places of two signatures
    estimates the Jaccard similarity of the sets.
    """
    starts = np.cumsum([0, *map(len, sets)])[:-1]
    values = np.concatenate(sets)
    made = np.empty((len(sets), _HASHES), dtype=np.uint32)
    for k in range(_HASHES):  # one at a time: a long text needs no table of 128 columns
        hashed = (values * _FACTORS[k] + _OFFSETS[k]) >> np.uint64(32)
        made[:, k] = np.minimum.reduceat(hashed, starts)
    return made


_FACTORS = mixed(np.arange(1, _HASHES + 1, dtype=np.uint64)) | np.uint64(1)  # odd: no two values meet
_OFFSETS = mixed(np.arange(_HASHES + 1, 2 * _HASHES + 1, dtype=np.uint64))


@final
@dataclass(frozen=True)
class _Store:
    """Signatures and shingles of all texts, on disk; `ends_n1[i]:ends_n1[i + 1]` are those of text i."""

    signatures_nH: NDArray[np.uint32]
    shingles: Shingles
    ends_n1: NDArray[np.int64]

    def of(self, index: int) -> Shingles:
        return self.shingles[self.ends_n1[index] : self.ends_n1[index + 1]]


def _stored(texts: Iterable[Text], folder: Path) -> _Store | None:
    ends = array("q", [0])
    with (folder / "signatures").open("wb") as signed, (folder / "shingles").open("wb") as all_shingles:
        for sets in _batches(map(shingles, texts)):
            signatures(sets).tofile(signed)
            for each in sets:
                each.tofile(all_shingles)
                ends.append(ends[-1] + len(each))
    if len(ends) == 1:
        return None
    return _Store(
        np.memmap(folder / "signatures", np.uint32, "r").reshape(-1, _HASHES),
        np.memmap(folder / "shingles", np.uint64, "r"),
        np.frombuffer(ends, dtype=np.int64),
    )


def _batches(sets: Iterable[Shingles]) -> Iterator[list[Shingles]]:
    batch: list[Shingles] = []
    total = 0
    for each in sets:
        batch.append(each)
        total += len(each)
        if total >= _BATCH:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def _stars(store: _Store, threshold: Fraction) -> Centres:
    """Each text in order joins the earliest centre it resembles, or becomes one."""
    centres = np.arange(len(store.ends_n1) - 1)
    counts = _counts(store.shingles)
    centres_of: dict[int, list[int]] = {}  # rare shingle -> the centres that have it, ascending
    # A text that shares no band with another is a centre, and nobody's candidate.
    for index in np.flatnonzero(_paired(store.signatures_nH, float(threshold))).tolist():
        rare = _rarest(store.of(index), counts, threshold)
        candidates = sorted({centre for shingle in rare for centre in centres_of.get(shingle, ())})
        centre = _first_alike(store, index, candidates, threshold)
        if centre is None:
            for shingle in rare:
                centres_of.setdefault(shingle, []).append(index)
        else:
            centres[index] = centre
    return centres


def _rarest(mine: Shingles, counts: NDArray[np.int64], threshold: Fraction) -> list[int]:
    """So many of the rarest shingles that alike texts share one of theirs, in whatever order all are ranked.

    Rare ones, so that texts which share a long preamble are not all compared with one another.

    Source: Chaudhuri, Ganti, Kaushik 2006, prefix filtering.
    """
    ranked = mine[np.argsort(counts[_slots(mine, len(counts))], kind="stable")]
    rare: list[int] = ranked[: len(mine) - math.ceil(threshold * len(mine)) + 1].tolist()
    return rare


def _counts(all_shingles: Shingles) -> NDArray[np.int64]:
    """How often shingles occur, by slot; those that share one are ranked together, which costs time alone."""
    slots = min(2 ** len(all_shingles).bit_length(), _SLOTS)
    counts = np.zeros(slots, dtype=np.int64)
    for start in range(0, len(all_shingles), slots):
        counts += np.bincount(_slots(all_shingles[start : start + slots], slots), minlength=slots)
    return counts


def _slots(values: Shingles, slots: int) -> NDArray[np.int64]:
    return (values & np.uint64(slots - 1)).astype(np.int64)


def _first_alike(store: _Store, index: int, candidates: list[int], threshold: Fraction) -> int | None:
    if not candidates:
        return None
    tried = np.array(candidates)
    mine = store.of(index)
    sizes = store.ends_n1[tried + 1] - store.ends_n1[tried]
    # The similarity is at most the smaller set over the larger one.
    smaller, larger = np.minimum(sizes, len(mine)), np.maximum(sizes, len(mine))
    tried = tried[smaller * threshold.denominator >= larger * threshold.numerator]
    estimates = (store.signatures_nH[tried] == store.signatures_nH[index]).mean(axis=1)
    tried = tried[estimates >= float(threshold) - _SLACK]
    return next((int(c) for c in tried if jaccard(store.of(int(c)), mine) >= threshold), None)


def _paired(signatures_nH: NDArray[np.uint32], threshold: float) -> NDArray[np.bool_]:
    """Which texts share a band of their signature with another text, bool [n]."""
    count, rows = len(signatures_nH), _rows_per_band(threshold)
    paired = np.zeros(count, dtype=bool)
    hashed = np.empty(count, dtype=np.uint64)
    for first in range(0, _HASHES, rows):
        for start in range(0, count, _CHUNK):
            part = signatures_nH[start : start + _CHUNK, first : first + rows].astype(np.uint64)
            hashed[start : start + _CHUNK] = mixed(
                (mixed(part) * _FACTORS[:rows]).sum(axis=1, dtype=np.uint64)
            )
        _, bucket, members = np.unique(hashed, return_inverse=True, return_counts=True)
        paired |= members[bucket] > 1
    return paired


def _rows_per_band(threshold: float) -> int:
    """The most rows of a band at which pairs at the threshold still share a band nearly always."""
    choices = [rows for rows in (1, 2, 4, 8, 16, 32, 64, _HASHES) if _misses(threshold, rows) <= _MISSED]
    return max(choices, default=1)


def _misses(similarity: float, rows: int) -> float:
    return float((1.0 - similarity**rows) ** (_HASHES // rows))
