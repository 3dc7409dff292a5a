"""Class labels as rows hold them, and the classes they name.

| a row's `label` | means |
|---|---|
| text | the name of its class |
| a whole number, or true and false | the class of that name where the names are numbers, else that index |
| a list of texts | the names of its classes, none or several |
| a list of 0 and 1, one per class | likewise, by position |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from ftlib.data.problems import describe
from ftlib.errors import ConfigError, DataError

__all__ = ["Labels", "find_labels"]

Kind = Literal["name", "number", "names", "vector"]
_WORDS: dict[Kind | None, str] = {
    "name": "the name of a class",
    "number": "the number of a class",
    "names": "a list of class names",
    "vector": "one 0 or 1 per class",
}
_SHOWN = 12  # class names in a message


@final
@dataclass(frozen=True)
class Labels:
    """The classes, in the order of a model's outputs.

    Args:
        names: one per class.
        several: a row may have any set of them, instead of exactly one.

    Raises:
        ConfigError: too few classes, an empty name, or one that stands twice.

    Example:
        >>> labels = Labels(("ham", "spam"))
        >>> labels.numbers("spam"), labels.numbers(0)
        ({'label': 1.0}, {'label': 0.0})
        >>> Labels(("ham", "spam"), several=True).numbers(["spam"])
        {'label_0': 0.0, 'label_1': 1.0}
    """

    names: tuple[str, ...]
    several: bool = False

    def __post_init__(self) -> None:
        fewest = 1 if self.several else 2
        if len(self.names) < fewest or not all(self.names):
            raise ConfigError(
                f"labels: expected at least {fewest} classes with names, got {_shown(self.names)}. Give all "
                "classes: labels=[...]."
            )
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"labels: expected each name once, got {_shown(self.names)}.")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def columns(self) -> tuple[str, ...]:
        """The extras of an encoded row: `label`, or `label_0`, `label_1`, ..."""
        return tuple(f"label_{k}" for k in range(len(self))) if self.several else ("label",)

    def numbers(self, cell: Any) -> dict[str, float]:
        """The extras of a row with this label.

        Raises:
            DataError: ``unknown_label``, or a label of another kind.
        """
        kind = _kind(cell)
        if self.several != (kind in ("names", "vector")):
            wanted = "a list of class names, or one 0 or 1 per class" if self.several else "one class"
            raise _problem(f"expected {wanted}, got {describe(cell)}.", cell)
        if not self.several:
            return {"label": float(self._index(cell))}
        if kind == "vector":
            if len(cell) != len(self):
                raise _problem(f"expected one 0 or 1 per class ({len(self)}), got {describe(cell)}.", cell)
            return dict(zip(self.columns, map(float, cell), strict=True))
        has = {self._index(name) for name in cell}
        return {name: float(k in has) for k, name in enumerate(self.columns)}

    def _index(self, cell: str | float) -> int:
        if _spelled(cell) in self.names:
            return self.names.index(_spelled(cell))
        numbers_are_names = all(name.lstrip("-").isdigit() for name in self.names)
        if not isinstance(cell, str) and not numbers_are_names and 0 <= cell < len(self):
            return int(cell)
        raise _problem(
            f"expected one of the classes {_shown(self.names)}, got {describe(cell)}. Correct the row, or "
            "name all classes: labels=[...].",
            cell,
            code="unknown_label",
        )


def find_labels(cells: Sequence[Any]) -> tuple[Labels | None, list[tuple[int, DataError]]]:
    """The classes that rows name, sorted: numbers by size, all else as text.

    Args:
        cells: the label of each row.

    Returns:
        The classes, and what is wrong with which rows; no classes where something is.

    Raises:
        ConfigError: fewer than two classes.
    """
    kinds: list[Kind | None] = []
    problems: list[tuple[int, DataError]] = []
    for row, cell in enumerate(cells):
        try:
            kinds.append(_kind(cell))
        except DataError as error:
            kinds.append(None)
            problems.append((row, error))
    first = next((k for k, cell in zip(kinds, cells, strict=True) if k is not None and cell != []), None)
    lengths = {len(cell) for cell, kind in zip(cells, kinds, strict=True) if kind == "vector"}
    for row, (cell, kind) in enumerate(zip(cells, kinds, strict=True)):
        if kind is None or (kind == first or (cell == [] and first == "names")):
            continue
        problems.append(
            (row, _problem(f"expected a {first}, as in the first row, got {describe(cell)}.", cell))
        )
    if not problems and len(lengths) > 1:
        odd = next(row for row, cell in enumerate(cells) if len(cell) != len(cells[0]))
        message = f"expected one 0 or 1 per class ({len(cells[0])}), got {describe(cells[odd])}."
        problems.append((odd, _problem(message, cells[odd])))
    if problems:
        return None, problems
    if first == "vector":
        return Labels(tuple(map(str, range(lengths.pop()))), several=True), []
    if first == "number":
        return Labels(tuple(map(_spelled, sorted(set(cells), key=float)))), []
    several = first != "name"
    return Labels(tuple(sorted(set(_flat(cells) if several else cells))), several=several), []


def label_shares(columns: Mapping[str, Sequence[Sequence[float]]], labels: Labels) -> list[int]:
    """How many rows of encoded data have each class."""
    if labels.several:
        return [sum(int(cell[0]) for cell in columns[name]) for name in labels.columns]
    found = [int(cell[0]) for cell in columns["label"]]
    return [found.count(k) for k in range(len(labels))]


def _flat(cells: Iterable[Iterable[str]]) -> list[str]:
    return [name for cell in cells for name in cell]


def _kind(cell: Any) -> Kind:
    if isinstance(cell, str) and cell.strip():
        return "name"
    if isinstance(cell, bool | int) or (isinstance(cell, float) and cell.is_integer()):
        return "number"
    if isinstance(cell, list) and all(isinstance(name, str) and name.strip() for name in cell):
        return "names"
    if isinstance(cell, list) and all(not isinstance(one, str) and one in (0, 1) for one in cell):
        return "vector"
    raise _problem(
        f"expected a class: its name, its number, a list of names, or one 0 or 1 per class; got "
        f"{describe(cell)}.",
        cell,
    )


def _spelled(cell: str | float) -> str:
    """A class as its name: 2.0, as tables hold whole numbers beside gaps, is "2"."""
    return cell if isinstance(cell, str) else str(cell) if isinstance(cell, bool) else str(int(cell))


def _problem(message: str, cell: Any, *, code: str = "bad_label") -> DataError:
    missing = cell is None or cell == ""
    return DataError(
        message, code="missing_label" if missing else code, column="label", excerpt=describe(cell)
    )


def _shown(names: Sequence[Any]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{list(names[:_SHOWN])}{more}"
