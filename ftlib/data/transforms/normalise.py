"""Text as it is compared: what people would call the same words is the same text."""

from __future__ import annotations

import unicodedata

__all__ = ["normalise"]


def normalise(text: str) -> str:
    r"""Text for comparing: NFKC, casefolded, punctuation and blanks to one blank, trimmed.

    Example:
        >>> normalise("  What's  NEW?")
        'what s new'
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.translate(_LETTERS).split())


class _Letters(dict[int, str]):
    """Code point -> itself, or a blank for punctuation, separators and controls; filled on demand."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        self[code] = " " if unicodedata.category(char)[0] in "PZC" else char
        return self[code]


_LETTERS = _Letters()
