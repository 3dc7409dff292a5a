"""What one pass over a column of text tells: what all texts share, and which candidates are free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

__all__ = ["Survey"]

_UPPER = bytes(range(ord("A"), ord("Z") + 1))
_LOWER = bytes(range(ord("a"), ord("z") + 1))


@final
@dataclass
class Survey:
    """Counts over the texts of one column.

    Args:
        candidates: affixes to look for anywhere in the texts.
        rows: texts seen.
        prefix: what all begin with.
        suffix: what all end in.
        same: whether all are one text.
        upper: upper-case letters.
        lower: lower-case letters.
        empty: texts without any character.
        multiline: whether any holds a newline.
        spaced: texts that start with a space.
        words: how many texts have no word, one, two, or more.
        held: those of `candidates` that occur.
    """

    candidates: Sequence[str]
    rows: int = 0
    prefix: str = ""
    suffix: str = ""
    same: bool = True
    upper: int = 0
    lower: int = 0
    empty: int = 0
    multiline: bool = False
    spaced: int = 0
    words: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    held: set[str] = field(default_factory=set)
    _first: str = ""

    def add(self, text: str) -> None:
        """Count one text."""
        if not self.rows:
            self.prefix = self.suffix = self._first = text
        self.rows += 1
        self.same = self.same and text == self._first
        if not text.startswith(self.prefix):
            self.prefix = self.prefix[: _shared(self.prefix, text)]
        if not text.endswith(self.suffix):
            shared = _shared(self.suffix[::-1], text[-len(self.suffix) :][::-1])
            self.suffix = self.suffix[len(self.suffix) - shared :]
        upper, lower = _cases(text)
        self.upper += upper
        self.lower += lower
        self.empty += not text
        self.multiline = self.multiline or "\n" in text
        self.spaced += text.startswith(" ")
        self.words[len(text.split(None, 2))] += 1
        for candidate in self.candidates:
            if candidate not in self.held and candidate in text:
                self.held.add(candidate)

    def mostly_upper(self, appended: str = "") -> bool:
        """Twice the upper-case letters outnumber the lower-case ones, those `appended` to all not counted."""
        upper, lower = _cases(appended)
        return 2 * (self.upper - self.rows * upper) > self.lower - self.rows * lower

    def upper_but(self, affix: str) -> int:
        """Upper-case letters outside of an affix that all texts have."""
        return self.upper - self.rows * _cases(affix)[0]

    def median_is_one_word(self, appended: str = "") -> bool:
        """The median length in words is at most 1, not counting the word that was `appended` to all."""
        return sum(self.words[: 2 + len(appended.split())]) > self.rows // 2


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with in common, by bisection."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _cases(text: str) -> tuple[int, int]:
    """Upper-case and lower-case letters."""
    if text.isascii():
        data = text.encode()
        return len(data) - len(data.translate(None, _UPPER)), len(data) - len(data.translate(None, _LOWER))
    return sum(map(str.isupper, text)), sum(map(str.islower, text))
