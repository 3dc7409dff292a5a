"""Rows that cannot be read: gathered into one error, or kept verbatim for a file of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import final

from ftlib.data.problems import gathered, rejected_entry
from ftlib.errors import DataError

__all__ = ["Rejects"]

_MOST = 1000  # bad rows after which reading stops, unless they are skipped


@final
class Rejects:
    """Bad rows.

    Args:
        folder: where those that are skipped wait.
        keep_going: skip them; otherwise they are one error.
    """

    def __init__(self, folder: Path, *, keep_going: bool) -> None:
        self.path = folder / "rejected"
        self.count = 0
        self.rows: list[int | str] = []  # the first ones
        self._keep_going = keep_going
        self._problems: list[DataError] = []

    def add(self, error: DataError, raw: str | None) -> None:
        """One bad row.

        Raises:
            DataError: there are too many to go on.
        """
        self.count += 1
        if not self._keep_going:
            self._problems.append(error)
            if len(self._problems) == _MOST:
                self.check()
            return
        if len(self.rows) < 20:
            self.rows.append((error.row or 0) if error.sheet is None else f"{error.sheet}!{error.row}")
        with self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(json.dumps(rejected_entry(error, raw)) + "\n")

    def check(self) -> None:
        """Raise all problems as one.

        Raises:
            DataError: there are some, and they are not to be skipped.
        """
        if self._problems:
            raise gathered(self._problems)
