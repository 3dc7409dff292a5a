"""What a check is: a row of a table, with a function that looks at the data and may propose a fix.

Nothing is changed by a check. It gives findings; a finding may carry a fix; whether that is applied is
decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from ftlib.data.preparation.intake import Intake
from ftlib.data.preparation.scan import Scan
from ftlib.data.preparation.settings import Settings
from ftlib.data.preparation.sides import Sides
from ftlib.data.preparation.table import Edit, Table
from ftlib.data.problems import SHOWN

__all__ = ["Check", "Context", "Default", "Finding", "Fix", "Level"]

Level = Literal["info", "warn"]
Default = Literal["necessary", "on", "off"]


@final
@dataclass(frozen=True)
class Fix:
    """What a check would do about a finding.

    Args:
        default: ``"necessary"`` is always done, ``"on"`` unless declined, ``"off"`` only if asked for.
        question: what to ask, without the question mark.
        params: for the report.
        drop: rows of the spool that go.
        edits: changes of texts.
        known: facts of the `Context` that hold once it is done.
    """

    default: Default
    question: str
    params: Mapping[str, Any] = field(default_factory=dict)
    drop: NDArray[np.int64] | None = None
    edits: tuple[Edit, ...] = ()
    known: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Finding:
    """One thing that a check has found.

    Args:
        message: in a sentence.
        rows: rows of the spool it is about.
        clusters: or groups of such rows; `count` is then the number of groups.
        count: how many there are, if not `rows` or `clusters` say it.
        data: details, by name.
        doubt: it deserves a look, whatever its fix.
        fix: what could be done.
        known: facts of the `Context` that hold from here on.
    """

    message: str
    rows: NDArray[np.int64] | Sequence[int] = ()
    clusters: Sequence[Sequence[int]] = ()
    count: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    doubt: bool = False
    fix: Fix | None = None
    known: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Context:
    """What a check can look at.

    Args:
        settings: what the user asked for.
        intake: the source, and what reading it has shown.
        table: the rows left by the fixes accepted so far.
        task: ``"open-ended"``, ``"classification"``, ``"conditional"``; or of rows that are no pairs of
            text ``"messages"`` or ``"preference"``.
        separator: what all prompts end in, if it is a separator.
        ending: what all completions end in, if it is an ending.
        removed_prefix: what was removed from the start of all prompts.
        sides: the split.
        finished: gives the table as it is after all further default fixes.
    """

    settings: Settings
    intake: Intake
    table: Table
    task: str = ""
    separator: str | None = None
    ending: str | None = None
    removed_prefix: str | None = None
    sides: Sides | None = None
    finished: Callable[[Context], Table] | None = None

    @property
    def is_pairs(self) -> bool:
        """Rows are prompts and completions in text."""
        return self.intake.form == "pairs"

    def labels(self, rows: Iterable[int]) -> list[int | str]:
        """How reports name these rows, the first 20."""
        return [self.intake.spool.label(row) for row in islice(rows, SHOWN)]

    @property
    def scan(self) -> Scan:
        """What one pass over the table found, for the checks that look into every row."""
        key = (self.separator, self.ending)
        if key not in self.table.scans:
            self.table.scans[key] = Scan.of(self.table, *key, is_pairs=self.is_pairs)
        found: Scan = self.table.scans[key]
        return found


@final
@dataclass(frozen=True)
class Check:
    """One check.

    Args:
        name: what reports and ``--fix`` call it.
        trigger: when it speaks, in words.
        remedy: its fix in words; empty where it only reports.
        default: of its fix; `None` where it only reports. A finding may say otherwise.
        find: the findings.
        pairs_only: it makes no sense of chat and preference rows.
        added: its findings are warnings.
    """

    name: str
    trigger: str
    find: Callable[[Context], Iterable[Finding]]
    remedy: str = ""
    default: Default | None = None
    pairs_only: bool = True
    added: bool = False

    def level(self, finding: Finding) -> Level:
        """Added checks, default-on fixes and doubts are warnings."""
        default_on = finding.fix is not None and finding.fix.default == "on"
        return "warn" if self.added or default_on or finding.doubt else "info"
