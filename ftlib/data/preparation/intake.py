"""The one pass over the source: rows to a spool of texts, and what reading them has shown."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from ftlib.data.formats import Rule
from ftlib.data.preparation.columns import COLUMNS, Form, form_of, missing, renamed, role_of, words
from ftlib.data.preparation.rejects import Rejects
from ftlib.data.preparation.settings import Settings
from ftlib.data.preparation.source import Part
from ftlib.data.preparation.spool import Spool
from ftlib.data.preparation.survey import Survey
from ftlib.data.preparation.table import Column, new_surveys
from ftlib.data.preparation.values import cell_text
from ftlib.data.reading import Facts, Located
from ftlib.errors import ConfigError, DataError

__all__ = ["Intake", "Rename", "take_in"]

_LOOKED_AT = 256  # rows that decide the form
_UNNAMED = "Unnamed: "


@final
@dataclass
class Rename:
    """A column that stands for the prompt or the completion under another spelling."""

    found: str
    loser: str | None = None


@final
@dataclass
class Intake:
    """What was read.

    Args:
        parts: the files, or the one object in memory.
        spool: the rows that could be read, as text.
        form: what the rows are.
        rejects: the rows that could not be read.
        columns: names of all columns, in order of appearance.
        renames: `prompt` or `completion` -> how it is spelled in the source, where that differs.
        empty: why a completion is empty -> rows of the spool.
        converted: rows with a value that was no text.
        surrogates: rows with lone surrogates.
        groups: a hash of the grouping column of each row, if the user named one.
        surveys: of pairs, what the texts of each column have in common.
    """

    parts: tuple[Part, ...]
    spool: Spool
    form: Form
    rejects: Rejects
    columns: list[str] = field(default_factory=list)
    renames: dict[str, Rename] = field(default_factory=dict)
    empty: dict[str, array[int]] = field(default_factory=dict)
    converted: array[int] = field(default_factory=lambda: array("q"))
    surrogates: array[int] = field(default_factory=lambda: array("q"))
    groups: array[int] = field(default_factory=lambda: array("q"))
    surveys: dict[Column, Survey] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def facts(self) -> Facts:
        """Of the first part."""
        return self.parts[0].facts

    @property
    def rows(self) -> int:
        """Rows read, the rejected ones included."""
        return len(self.spool) + self.rejects.count

    @property
    def extra(self) -> list[str]:
        """Columns that are neither prompt nor completion."""
        spelled = {rename.found for column, rename in self.renames.items() if column not in self.columns}
        return [name for name in self.columns if name not in spelled and name not in COLUMNS]

    @property
    def unnamed(self) -> list[str]:
        """Those of them that have no name, such as the index that a frame was saved with."""
        return [name for name in self.extra if not name.strip() or name.startswith(_UNNAMED)]

    def array(self, name: str) -> NDArray[np.int64]:
        """A per-row array of the spool, int64 [rows]."""
        return np.array(getattr(self.spool, name), dtype=np.int64)


def take_in(parts: tuple[Part, ...], settings: Settings, folder: Path) -> Intake:
    """Read all parts.

    Args:
        parts: what to read.
        settings: what the user asked for.
        folder: for the spool and the rejected rows.

    Raises:
        DataError: columns that are absent; no rows; bad rows, all at once, unless they are to be skipped.
    """
    rows = ((part.facts.format, located) for part in parts for located in part.rows)
    rejects = Rejects(folder, keep_going=settings.skip_bad)
    good = (
        (kind, located, value)
        for kind, located in rows
        if (value := _value(kind, located, settings, rejects)) is not None
    )
    head = list(islice(good, _LOOKED_AT))
    if not head:
        rejects.check()
        raise DataError(
            "expected rows, got none." + (" All rows are bad." if rejects.count else ""),
            code="empty_data",
            file=parts[0].facts.file,
        )
    form, rule = form_of([value for _, _, value in head])
    intake = Intake(parts, Spool(folder), form, rejects)
    with closing(intake.spool):
        if rule is None:
            _take_pairs(intake, chain(head, good), settings)
        else:
            _take_others(intake, chain(head, good), rule, settings)
    rejects.check()
    for part in parts:
        intake.notes += part.notes
    if not len(intake.spool):
        raise DataError("expected rows, got none: all are bad.", code="empty_data", file=intake.facts.file)
    return intake


Rows = Iterator[tuple[str, Located, dict[str, Any]]]  # format of the file, place, row


def _value(kind: str, located: Located, settings: Settings, rejects: Rejects) -> dict[str, Any] | None:
    """The row under canonical names; `None` for a bad one."""
    if isinstance(located.value, DataError):
        rejects.add(located.value, located.raw)
        return None
    if kind == "txt":
        if settings.columns:
            raise ConfigError("prepare: columns has no effect on plain text, which has none. Leave it out.")
        return {"prompt": "", "completion": located.value["text"]}
    return renamed(located.value, settings.columns)


def _take_pairs(intake: Intake, rows: Rows, settings: Settings) -> None:
    seen: dict[str, None] = {}
    first: Mapping[str, Any] = {}
    have: set[str] = set()
    intake.surveys = new_surveys()
    in_prompts, in_completions = intake.surveys["prompt"], intake.surveys["completion"]
    for kind, located, row in rows:
        first = first or row
        if not row.keys() <= seen.keys():
            seen.update(dict.fromkeys(row))
        names = _spelled(row, intake.renames)
        have.update(names)
        prompt, completion = (
            cell_text(
                row.get(names.get(column, column)),
                present=column in names,
                in_workbook=kind == "xlsx",
                in_table=kind in ("csv", "tsv"),
            )
            for column in COLUMNS
        )
        index = len(intake.spool)
        intake.spool.append(located.place, prompt.text, completion.text)
        in_prompts.add(prompt.text)
        in_completions.add(completion.text)
        if completion.empty is not None:
            intake.empty.setdefault(completion.empty, array("q")).append(index)
        if prompt.converted or completion.converted:
            intake.converted.append(index)
        if prompt.surrogates or completion.surrogates:
            intake.surrogates.append(index)
        if settings.group not in (None, "prompt", "near"):
            intake.groups.append(_digest(row.get(str(settings.group))))
    intake.columns = list(seen)
    _check_columns(intake, have, first, settings)


def _spelled(row: Mapping[str, Any], renames: dict[str, Rename]) -> dict[str, str]:
    """How prompt and completion are spelled in a row: the exact name wins."""
    names: dict[str, str] = {column: column for column in COLUMNS if column in row}
    if len(names) == len(COLUMNS) == len(row):
        return names
    for name in row:
        column = role_of(name)
        if column is None or name == column:
            continue
        rename = renames.setdefault(column, Rename(name))
        if column in names:
            rename.loser = name if name != names[column] else rename.loser
        else:
            names[column] = name
    return names


def _check_columns(intake: Intake, have: set[str], first: Mapping[str, Any], settings: Settings) -> None:
    """Refuse absent columns, and names the user gave that are not there."""
    needed = ["completion"] if settings.task == "open-ended" else list(COLUMNS)
    absent = [column for column in needed if column not in have]
    _check_mapped(intake, settings)
    if absent:
        raise missing(absent, intake.columns, intake.facts, first)
    group = settings.group
    if group not in (None, "prompt", "near") and group not in intake.columns:
        raise DataError(
            f"expected a column {group!r} to group by, found {intake.columns}. Name one of these, "
            "'prompt' or 'near'.",
            code="missing_column",
            file=intake.facts.file,
            column=group,
        )


def _check_mapped(intake: Intake, settings: Settings) -> None:
    unmapped = [given for canonical, given in settings.columns.items() if canonical not in intake.columns]
    if unmapped:
        raise DataError(
            f"expected the columns {unmapped}, found {intake.columns}. Map a column that is there.",
            code="missing_column",
            file=intake.facts.file,
            column=unmapped[0],
        )


def _take_others(intake: Intake, rows: Rows, rule: Rule, settings: Settings) -> None:
    """Messages and preferences: each row is checked, and kept as it stands."""
    seen: dict[str, None] = {}
    for _, located, row in rows:
        seen.update(dict.fromkeys(row))
        text = cell_text(row)
        try:
            said = cell_text(words(row, rule))
        except DataError as error:
            if error.code == "unknown_role":
                raise error.replaced(file=located.place.file, row=located.place.row) from error
            intake.rejects.add(
                error.replaced(file=located.place.file, row=located.place.row, sheet=located.place.sheet),
                text.text,
            )
            continue
        if said.surrogates or text.surrogates:
            intake.surrogates.append(len(intake.spool))
        intake.spool.append(located.place, said.text, text.text)
    intake.columns = list(seen)
    _check_mapped(intake, settings)


def _digest(value: Any) -> int:
    """64 bits that depend on the value alone."""
    text = json.dumps(value, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def rows_with(reasons: Mapping[str, Iterable[int]]) -> NDArray[np.int64]:
    """All rows of several reasons, in order."""
    return np.array(sorted(row for rows in reasons.values() for row in rows), dtype=np.int64)
