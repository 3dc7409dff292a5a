"""Numbers with their nouns, for sentences of reports."""

from __future__ import annotations

__all__ = ["counted"]


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number and its noun.

    Example:
        >>> counted(1, "row"), counted(1200, "row"), counted(0, "class", "classes")
        ('1 row', '1,200 rows', '0 classes')
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
