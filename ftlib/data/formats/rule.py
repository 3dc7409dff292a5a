"""What a format is: a small record that says which columns it needs, and how a row becomes a record.

Most formats are declared by their slots: a slot is one meaning, the columns it may stand in, and the type
it must have. `slotted` makes the rule; its converter sees the slots, not the columns.

To add a format, write a file with a `slotted` rule and its converter, and put it in its place in
`ftlib.data.formats.RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

from ftlib.data import cells
from ftlib.data.cells import Roles, is_side
from ftlib.data.messages import ROLES, is_message_list
from ftlib.data.reading import Located
from ftlib.data.segments import Row
from ftlib.data.spellings import is_pair, is_ranked

__all__ = [
    "Converted",
    "Dropped",
    "FormatOptions",
    "Found",
    "Gathered",
    "Outputs",
    "Rule",
    "Slot",
    "compares",
    "optional",
    "side",
    "slotted",
    "text",
    "turn",
]

Outputs = Literal["first", "all"]


@final
@dataclass(frozen=True)
class FormatOptions:
    """What the user said about the rows. See `load_records`."""

    roles: Roles = field(default_factory=lambda: ROLES)
    outputs: Outputs = "first"


@final
@dataclass(frozen=True)
class Dropped:
    """A row that its own data say to leave out; it is counted under `reason`."""

    reason: str


@final
@dataclass(frozen=True)
class Gathered:
    """Rows made of others: the rows to convert, and those that went into none, by reason."""

    rows: list[Located]
    dropped: Mapping[str, int]


Converted = dict[str, Any] | list[dict[str, Any]] | Dropped


@final
@dataclass(frozen=True)
class Rule:
    """One record format.

    Args:
        name: what `format=` calls it.
        keys: the columns it is known by, as errors and pages tell them.
        known_as: data sets and tools that write it.
        columns: the canonical columns of its records, optional ones left out.
        needs: the columns of the source that it needs, in their first spelling.
        fits: whether a row has these keys with usable types; null counts as absent.
        convert: a row to its record, to several, or to why it is left out; raises DataError for a bad row.
        reads: the columns of a row that `convert` reads.
        names: every column that it can read, for `columns=`.
        number: its place in the table; `None` for a format that is never guessed.
        obeys: options of `load_records` that mean something to it, ``outputs`` or ``pairs``.
        gather: rows of the whole source to rows that `convert` takes, for formats whose records are spread
            over rows.
    """

    name: str
    keys: str
    known_as: str
    columns: tuple[str, ...]
    needs: tuple[str, ...]
    fits: Callable[[Row], bool]
    convert: Callable[[Row, FormatOptions], Converted]
    reads: Callable[[Row], tuple[str, ...]]
    names: tuple[str, ...]
    number: int | None = None
    obeys: tuple[str, ...] = ()
    gather: Callable[[Sequence[Located], FormatOptions], Gathered] | None = None


@final
@dataclass(frozen=True)
class Slot:
    """One meaning: the columns it may stand in, the first that is there counts, and the type it must have."""

    names: tuple[str, ...]
    holds: Callable[[Any], bool]
    needed: bool = True


def text(*names: str) -> Slot:
    """A slot of text."""
    return Slot(names, lambda value: isinstance(value, str))


def side(*names: str) -> Slot:
    """A slot of text or messages."""
    return Slot(names, is_side)


def optional(*names: str) -> Slot:
    """A slot that may be absent; its converter checks what it holds."""
    return Slot(names, lambda _: True, needed=False)


@final
@dataclass(frozen=True)
class Found:
    """The slots of one row."""

    row: Row
    columns: Mapping[str, str]  # slot -> the column it stands in, or would stand in

    def __contains__(self, slot: str) -> bool:
        return self[slot] is not None

    def __getitem__(self, slot: str) -> Any:
        """The value; `None` where it is absent."""
        return self.row.get(self.columns[slot])

    def text(self, slot: str, *, empty: bool = False) -> str:
        """The value as text.

        Raises:
            DataError: anything else; blank text, unless `empty`.
        """
        return cells.text(self[slot], self.columns[slot], empty=empty)

    def text_or_none(self, slot: str) -> str | None:
        """Text that is there and not blank.

        Raises:
            DataError: something else than text.
        """
        if slot not in self:
            return None
        found = self.text(slot, empty=True)
        return found if found.strip() else None

    def messages(self, slot: str, options: FormatOptions) -> list[dict[str, Any]]:
        """The value as canonical messages.

        Raises:
            DataError: anything else.
        """
        return cells.messages(self[slot], self.columns[slot], options.roles)

    def side(self, slot: str, options: FormatOptions, *, empty: bool = False) -> str | list[dict[str, Any]]:
        """The value as text or canonical messages."""
        return self.messages(slot, options) if is_message_list(self[slot]) else self.text(slot, empty=empty)


def slotted(
    name: str,
    slots: Mapping[str, Slot],
    convert: Callable[[Found, FormatOptions], Converted],
    *,
    keys: str,
    known_as: str,
    columns: tuple[str, ...],
    number: int | None = None,
    unless: Callable[[Row], bool] | None = None,
    any_case: bool = False,
    obeys: tuple[str, ...] = (),
) -> Rule:
    """A rule declared by its slots.

    Args:
        name: as in `Rule`.
        slots: slot -> the columns it may stand in.
        convert: the slots of a row to its record.
        keys: as in `Rule`.
        known_as: likewise.
        columns: likewise.
        number: likewise.
        unless: rows that are something else although they have these columns; `compares` unless told.
        any_case: columns are found whatever their case.
        obeys: as in `Rule`.
    """

    def found(row: Row) -> Found:
        spelled = _any_case(row) if any_case else {}
        return Found(row, {slot: _column(row, spec.names, spelled) for slot, spec in slots.items()})

    needed = [spec for spec in slots.values() if spec.needed]

    def fits(row: Row) -> bool:
        spelled = _any_case(row) if any_case else {}
        for spec in needed:
            value = row.get(_column(row, spec.names, spelled))
            if value is None or not spec.holds(value):
                return False
        return not (unless or compares)(row)

    return Rule(
        name,
        keys,
        known_as,
        columns,
        tuple(spec.names[0] for spec in needed),
        fits,
        lambda row, options: convert(found(row), options),
        lambda row: tuple(column for column in found(row).columns.values() if column in row),
        tuple(each for spec in slots.values() for each in spec.names),
        number,
        obeys,
    )


def _column(row: Row, names: tuple[str, ...], spelled: Mapping[str, str]) -> str:
    """The first of `names` that the row has; the first of all where it has none."""
    for name in names:
        name = spelled.get(name, name)
        if row.get(name) is not None:
            return name
    return names[0]


def _any_case(row: Row) -> dict[str, str]:
    """Lower-case names -> the row's own; of two that differ in case alone the first."""
    return {key.casefold(): key for key in reversed(list(row)) if row[key] is not None}


def compares(row: Row) -> bool:
    """A pair or ranked answers, a part of which may be missing: no other rule may take such a row."""
    return is_pair(row) or is_ranked(row)


def turn(role: str, content: str) -> dict[str, Any]:
    """One message."""
    return {"role": role, "content": content}
