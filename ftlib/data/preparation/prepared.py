"""What `prepare` gives back."""

from __future__ import annotations

import shutil
import weakref
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, final

from ftlib.data.preparation.describe import describe_report
from ftlib.data.preparation.run import Action, Outcome
from ftlib.data.preparation.writing import earlier_report, has_something_to_write, write_all

__all__ = ["Prepared"]


@final
class Prepared:
    """Checked and, where fixes were applied, changed rows. Made by `prepare`.

    Printing it shows the findings and what was done about them.

    Args:
        outcome: of the checks.
        report: of it, as plain data; see `docs/prepare.md` for its fields.
        folder: of the temporary files, deleted with this object.
    """

    def __init__(self, outcome: Outcome, report: dict[str, Any], folder: Path) -> None:
        self.report = report
        self._outcome = outcome
        self._folder = folder
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @property
    def actions(self) -> list[Action]:
        """The fixes that were proposed, and whether each was applied, in check order."""
        return self._outcome.actions

    @cached_property
    def records(self) -> Any:
        """The rows in their order, as a `datasets.Dataset` with `_source`, mapped from disk.

        Pairs have `prompt` and `completion`; messages and preferences the columns that `load_records`
        gives them.
        """
        from ftlib.data.preparation.records import to_records

        return to_records(self._outcome, self._folder)

    @cached_property
    def train(self) -> Any:
        """The training rows of the split, or `None` without one."""
        return self._side("train")

    @cached_property
    def valid(self) -> Any:
        """The validation rows of the split, or `None` without one."""
        return self._side("valid")

    @property
    def changed(self) -> bool:
        """Whether there is anything to write: a fix was applied, a split was made, or rows were rejected."""
        return has_something_to_write(self._outcome)

    def write(self, folder: str | PathLike[str] | None = None) -> list[Path]:
        """Write data and report, whole or not at all; never over another file.

        Nothing is written where nothing was changed, or where an earlier run has left the same in this
        folder.

        Args:
            folder: made if absent; `None` is beside the source.

        Returns:
            The data files and the report; empty where nothing was written.

        Raises:
            ConfigError: no folder for data from memory; two files of one name.
            DataError: ``not_written``: the folder cannot be written to, or the disk is full.
        """
        if not self.changed:
            return []
        place = None if folder is None else Path(folder)
        part = self._outcome.context.intake.parts[0]
        beside = place if place is not None else part.path.parent if part.path is not None else None
        if beside is not None and beside.is_dir():
            files = self.report["input"].get("files", [self.report["input"]])
            shas = tuple(file["sha256"] for file in files)
            if earlier_report(beside, shas, self.report["options"]) is not None:
                return []
        return write_all(self._outcome, self.report, place)

    def _side(self, name: str) -> Any:
        sides = self._outcome.context.sides
        if sides is None:
            return None
        position = {row: at for at, row in enumerate(self._outcome.context.table.indices.tolist())}
        return self.records.select([position[row] for row in getattr(sides, name).tolist()])

    def __str__(self) -> str:
        return describe_report(self.report)
