"""The table that checks look at: the rows that are left, with the accepted edits applied on the way."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from ftlib.data.preparation.affixes import ENDINGS, LAST_ENDING, LAST_SEPARATOR, SEPARATORS
from ftlib.data.preparation.spool import Spool
from ftlib.data.preparation.survey import Survey

__all__ = ["Column", "Edit", "Row", "Table", "new_surveys"]

Column = Literal["prompt", "completion"]
_CANDIDATES: Mapping[Column, tuple[str, ...]] = {
    "prompt": (*SEPARATORS, LAST_SEPARATOR),
    "completion": (*ENDINGS, LAST_ENDING),
}


def new_surveys() -> dict[Column, Survey]:
    """Surveys of both columns that have seen nothing yet."""
    return {column: Survey(candidates) for column, candidates in _CANDIDATES.items()}


class Row(NamedTuple):
    """One row: its number in the spool, and its texts."""

    number: int
    prompt: str
    completion: str


@final
@dataclass(frozen=True)
class Edit:
    """A change of one column, the same function for every row; `check` is the check that asked for it."""

    check: str
    column: Column
    change: Callable[[str], str]


@final
@dataclass(frozen=True, eq=False)
class Table:
    """Rows of a spool: those for which `kept` is true, after `edits` in order.

    A table is never changed: dropping rows or editing gives another one. What a pass has found out is
    remembered, and handed on where it still holds.

    Args:
        spool: holds the rows.
        kept: bool [rows of the spool].
        edits: in order.
        surveys: of columns, as far as they are known.
        scans: whatever else passes have found out, by name.
    """

    spool: Spool
    kept: NDArray[np.bool_]
    edits: tuple[Edit, ...] = ()
    surveys: dict[Column, Survey] = field(default_factory=dict)
    scans: dict[Any, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.kept.sum())

    @cached_property
    def indices(self) -> NDArray[np.int64]:
        """The rows that are left, int64 [len]."""
        return np.flatnonzero(self.kept)

    def rows(self, order: Iterable[int] | None = None) -> Iterator[Row]:
        """Every row that is left, in order, or in the `order` of these rows of the spool."""
        change_prompt, change_completion = self._changes("prompt"), self._changes("completion")
        rows = self.spool.rows(self.kept) if order is None else self.spool.read(order)
        for index, prompt, completion in rows:
            yield Row(index, _changed(prompt, change_prompt)[0], _changed(completion, change_completion)[0])

    def both(self) -> Iterator[tuple[Row, Row]]:
        """Every row as it came, and as it is now.

        Once it has gone to the end, this pass has found out all that `survey`, `completion_hashes` and
        `changed_by` need.
        """
        change_prompt, change_completion = self._changes("prompt"), self._changes("completion")
        surveys = {column: made for column, made in new_surveys().items() if column not in self.surveys}
        hashes, by = array("q"), array("q")
        for given in map(Row._make, self.spool.rows(self.kept)):
            prompt, by_prompt = _changed(given.prompt, change_prompt)
            completion, by_completion = _changed(given.completion, change_completion)
            for column, survey in surveys.items():
                survey.add(prompt if column == "prompt" else completion)
            hashes.append(hash(completion))
            by.append(by_prompt | by_completion)
            yield given, Row(given.number, prompt, completion)
        self.surveys.update(surveys)
        self.scans.update(hashes=np.array(hashes, dtype=np.int64), changed_by=by)

    def changed_by(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Rows that the edits change, and the checks that asked for these."""
        if not self.edits:
            return
        for index, by in zip(self.indices.tolist(), self._found("changed_by"), strict=True):
            if by:
                checks = (edit.check for at, edit in enumerate(self.edits) if by >> at & 1)
                yield index, tuple(dict.fromkeys(checks))

    def dropped(self, rows: NDArray[np.int64]) -> Table:
        """The table without these rows of the spool."""
        kept = self.kept.copy()
        kept[rows] = False
        return Table(self.spool, kept, self.edits)

    def edited(self, edit: Edit) -> Table:
        """The table after one more edit."""
        known = {column: survey for column, survey in self.surveys.items() if column != edit.column}
        return Table(self.spool, self.kept, (*self.edits, edit), known)

    def survey(self, column: Column) -> Survey:
        """What the texts of a column have in common."""
        if column not in self.surveys:
            made = {name: survey for name, survey in new_surveys().items() if name not in self.surveys}
            for row in self.rows():
                for name, survey in made.items():
                    survey.add(row.prompt if name == "prompt" else row.completion)
            self.surveys.update(made)
        return self.surveys[column]

    @cached_property
    def completion_hashes(self) -> NDArray[np.int64]:
        """A hash of each completion, int64 [len]; equal for equal texts."""
        if not any(edit.column == "completion" for edit in self.edits):
            return np.array(self.spool.completion_hashes, dtype=np.int64)[self.kept]
        hashes: NDArray[np.int64] = self._found("hashes")
        return hashes

    @cached_property
    def distinct_completions(self) -> int:
        """How many different completions there are."""
        return len(np.unique(self.completion_hashes))

    def _changes(self, column: Column) -> list[tuple[int, Callable[[str], str]]]:
        """The edits of a column, each with a bit of its own."""
        return [(1 << at, edit.change) for at, edit in enumerate(self.edits) if edit.column == column]

    def _found(self, name: str) -> Any:
        """What `both` finds out by the way."""
        if name not in self.scans:
            deque(self.both(), maxlen=0)
        return self.scans[name]


def _changed(text: str, changes: list[tuple[int, Callable[[str], str]]]) -> tuple[str, int]:
    """The text after some edits, and the bits of those that made a difference."""
    by = 0
    for bit, change in changes:
        before, text = text, change(text)
        if text != before:
            by |= bit
    return text, by
