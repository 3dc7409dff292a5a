"""The table that checks look at: the rows that are left, with the accepted edits applied on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from ftlib.data.preparation.affixes import ENDINGS, LAST_ENDING, LAST_SEPARATOR, SEPARATORS
from ftlib.data.preparation.spool import Spool
from ftlib.data.preparation.survey import Survey

__all__ = ["Column", "Edit", "Row", "Table"]

Column = Literal["prompt", "completion"]
_CANDIDATES: Mapping[Column, tuple[str, ...]] = {
    "prompt": (*SEPARATORS, LAST_SEPARATOR),
    "completion": (*ENDINGS, LAST_ENDING),
}


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
    """

    spool: Spool
    kept: NDArray[np.bool_]
    edits: tuple[Edit, ...] = ()
    _known: dict[Column, Survey] = field(default_factory=dict)
    scans: dict[Any, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.kept.sum())

    @cached_property
    def indices(self) -> NDArray[np.int64]:
        """The rows that are left, int64 [len]."""
        return np.flatnonzero(self.kept)

    def rows(self, order: Iterable[int] | None = None) -> Iterator[Row]:
        """Every row that is left, in order, or in the `order` of these rows of the spool."""
        for _, row in self.both(order):
            yield row

    def both(self, order: Iterable[int] | None = None) -> Iterator[tuple[Row, Row]]:
        """Every row as it came, and as it is now; a pass over the file."""
        prompt_edits = [edit.change for edit in self.edits if edit.column == "prompt"]
        completion_edits = [edit.change for edit in self.edits if edit.column == "completion"]
        rows = self.spool.rows(self.kept) if order is None else self.spool.read(order)
        for index, prompt, completion in rows:
            given = Row(index, prompt, completion)
            for change in prompt_edits:
                prompt = change(prompt)
            for change in completion_edits:
                completion = change(completion)
            yield given, Row(index, prompt, completion)

    def changed_by(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Rows that the edits change, and the checks that asked for these."""
        for index, prompt, completion in self.spool.rows(self.kept):
            texts: dict[Column, str] = {"prompt": prompt, "completion": completion}
            by: dict[str, None] = {}
            for edit in self.edits:
                before = texts[edit.column]
                texts[edit.column] = edit.change(before)
                if texts[edit.column] != before:
                    by[edit.check] = None
            if by:
                yield index, tuple(by)

    def dropped(self, rows: NDArray[np.int64]) -> Table:
        """The table without these rows of the spool."""
        kept = self.kept.copy()
        kept[rows] = False
        return Table(self.spool, kept, self.edits)

    def edited(self, edit: Edit) -> Table:
        """The table after one more edit."""
        known = {column: survey for column, survey in self._known.items() if column != edit.column}
        return Table(self.spool, self.kept, (*self.edits, edit), known)

    def survey(self, column: Column) -> Survey:
        """What the texts of a column have in common."""
        if column not in self._known:
            missing = [name for name in _CANDIDATES if name not in self._known]
            made = {name: Survey(_CANDIDATES[name]) for name in missing}
            for row in self.rows():
                for name, survey in made.items():
                    survey.add(row.prompt if name == "prompt" else row.completion)
            self._known.update(made)
        return self._known[column]

    @cached_property
    def completion_hashes(self) -> NDArray[np.int64]:
        """A hash of each completion, int64 [len]; equal for equal texts."""
        if not any(edit.column == "completion" for edit in self.edits):
            return np.array(self.spool.completion_hashes, dtype=np.int64)[self.kept]
        return np.fromiter((hash(row.completion) for row in self.rows()), np.int64, len(self))

    @cached_property
    def distinct_completions(self) -> int:
        """How many different completions there are."""
        return len(np.unique(self.completion_hashes))
