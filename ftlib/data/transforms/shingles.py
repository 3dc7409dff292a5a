"""Runs of words or characters as 64-bit numbers, for comparing texts by what they share.

Numbers depend on the text alone: not on the process, the machine's byte order or the hash seed. Two
different runs get one number with probability 2**-64.

Shapes: S shingles of a text, W words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ftlib.data.transforms.normalise import normalise

__all__ = ["Parts", "Shingles", "Text", "mixed", "runs", "shingles", "word_codes"]

Shingles = NDArray[np.uint64]
Parts = Sequence[tuple[str, str]]  # (mark, text): the same words under different marks share nothing
Text = str | Parts

_WORDS = 5  # of a shingle; texts of fewer words are compared by characters
_CHARACTERS = 5


def shingles(text: Text) -> Shingles:
    """The set of word 5-grams of normalised text; under 5 words of its character 5-grams; under 5
    characters the text itself.

    Args:
        text: one text, or several parts under marks, whose sets are joined.

    Returns:
        uint64 [S], ascending, each number once; S >= 1.
    """
    parts = [("", text)] if isinstance(text, str) else text
    return np.unique(np.concatenate([_of_part(mark, part) for mark, part in parts]))


def _of_part(mark: str, text: str) -> Shingles:
    normalised = normalise(text)
    words = normalised.split()
    if len(words) >= _WORDS:
        return mixed(runs(word_codes(words), _WORDS) + _code(f"words\0{mark}"))
    characters = np.frombuffer(normalised.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    codes = characters.astype(np.uint64)
    if len(codes) < _CHARACTERS:
        return mixed(np.array([_code(normalised)], dtype=np.uint64) + _code(f"whole\0{mark}"))
    return mixed(runs(codes, _CHARACTERS) + _code(f"characters\0{mark}"))


def word_codes(words: Sequence[str]) -> Shingles:
    """One number per word, uint64 [W]."""
    return np.fromiter(map(_word, words), dtype=np.uint64, count=len(words))


def runs(codes: Shingles, length: int) -> Shingles:
    """One number per run of `length` neighbours, uint64 [W - length + 1]; none where there are fewer."""
    count = len(codes) - length + 1
    total = np.zeros(max(count, 0), dtype=np.uint64)
    for place in range(length if count > 0 else 0):
        total += codes[place : place + count] * _code(f"place {place} of {length}")
    return total


def mixed(values: Shingles) -> Shingles:
    """Every bit of the result depends on every bit of `values`.

    Source: Steele, Lea, Flood 2014, SplitMix64's finaliser.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=2**18)
def _word(word: str) -> int:
    digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@lru_cache(maxsize=2**10)
def _code(name: str) -> np.uint64:
    return np.uint64(_word(name))
