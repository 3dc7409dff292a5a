"""Which format rows are in: by name, by the columns that are mapped, or by looking.

A rule holds for data when it fits every row looked at; null counts as absent. Rules are tried in order, and
the first that holds is the format. Where none holds, but one fits most rows, that one is the format and the
other rows are bad rows of it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from ftlib.data.formats import BY_NAME, RULES, Rule, rule_named
from ftlib.data.reading import Place
from ftlib.data.segments import Row
from ftlib.errors import ConfigError, DataError

__all__ = ["LOOKED_AT", "Choice", "choose", "header_hint", "looked_at"]

LOOKED_AT = 256  # first rows that decide the format, and as many drawn from the rest
NEAREST = 3  # formats, and rows, that an error names


@final
@dataclass(frozen=True)
class Choice:
    """The format of some rows, and why.

    Args:
        rule: the format; `None` takes rows as they are.
        mixed: every row has its own; `rule` is then `None`.
        looked_at: rows that were looked at; 0 where the format was named.
        fits: rule -> how many of these it fits, those that fit none left out.
        ignored: columns of later rules that hold as well.
    """

    rule: Rule | None
    mixed: bool = False
    looked_at: int = 0
    fits: Mapping[str, int] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The format, as `format=` calls it."""
        if self.rule is None:
            return "mixed" if self.mixed else "rows"
        return self.rule.name

    def of(self, row: Row) -> Rule | None:
        """The format of one row.

        Raises:
            DataError: ``unknown_format``, where every row has its own.
        """
        if not self.mixed:
            return self.rule
        rule = next((rule for rule in RULES if rule.fits(row)), None)
        if rule is None:
            raise DataError(
                f"expected one of the known formats, found the keys {_keys([row])}.", code="unknown_format"
            )
        return rule


def choose(
    rows: Sequence[Row],
    *,
    format: str,  # noqa: A002  the name users know
    columns: Mapping[str, str],
    strict: bool,
    mixed: bool,
    file: str,
    places: Sequence[Place] = (),
    is_table: bool = False,
) -> Choice:
    """The format of `rows`, which are those looked at, their columns renamed already.

    Args:
        rows: without those that cannot be read.
        format: ``"auto"``, ``"rows"``, or the name of a rule.
        columns: canonical name -> name in the source.
        strict: refuse rows that are in two formats.
        mixed: decide row by row.
        file: for errors.
        places: of the rows, for errors.
        is_table: the file has a header, which may be missing.

    Raises:
        DataError: ``unknown_format``, ``missing_column`` or ``ambiguous_format``.
        ConfigError: options that clash, or an unknown name.
    """
    if mixed:
        if format != "auto":
            raise ConfigError(f"load_records: mixed=True decides the format itself, got format={format!r}.")
        return Choice(None, mixed=True)
    if format == "rows":
        return Choice(None)
    if format != "auto":
        rule = rule_named(format)
        _require(rule, rows, file, is_table=is_table)
        return Choice(rule)
    candidates = _candidates(columns)
    fits = {rule.name: sum(map(rule.fits, rows)) for rule in candidates}
    best = max(candidates, key=lambda rule: fits[rule.name])  # of equals the first in the table
    if fits[best.name] * 2 <= len(rows):
        raise _unknown(rows, fits, file, places, is_table=is_table)
    ignored = _ignored(best, candidates, fits, rows)
    if strict and ignored:
        raise DataError(
            f"expected rows in one format, got {best.name!r} and, with the columns {list(ignored)}, another. "
            f"Name the one you mean: format={best.name!r}.",
            code="ambiguous_format",
            file=file,
        )
    return Choice(best, False, len(rows), {name: count for name, count in fits.items() if count}, ignored)


def header_hint(is_table: bool) -> str:
    """What to do about a header that is none."""
    return " If the first row is no header: header=False." if is_table else ""


def looked_at(rows: Sequence[Any]) -> list[Any]:
    """The first rows and a sample of the rest, the same for the same data."""
    rest = rows[LOOKED_AT:]
    sample = random.Random(0).sample(range(len(rest)), min(LOOKED_AT, len(rest)))  # noqa: S311  no secret
    return [*rows[:LOOKED_AT], *(rest[i] for i in sorted(sample))]


def _candidates(columns: Mapping[str, str]) -> list[Rule]:
    """The rules that read all columns that were mapped for any rule; all rules where none does."""
    known = {name for rule in RULES for name in rule.names}
    mapped = known.intersection(columns)
    return [rule for rule in RULES if mapped <= set(rule.names)] or list(RULES)


def _ignored(
    best: Rule, candidates: Sequence[Rule], fits: Mapping[str, int], rows: Sequence[Row]
) -> tuple[str, ...]:
    """What other rules that hold would read, and this one does not."""
    if fits[best.name] < len(rows):
        return ()
    read = {name for row in rows for name in best.reads(row)}
    others = candidates[candidates.index(best) + 1 :]
    found = {
        name
        for rule in others
        if fits[rule.name] == len(rows)
        for row in rows
        for name in rule.reads(row)
        if name not in read and row.get(name) is not None
    }
    return tuple(sorted(found))


def _require(rule: Rule, rows: Sequence[Row], file: str, *, is_table: bool) -> None:
    """A column that no row has is one error, not one per row."""
    if any(rule.fits(row) for row in rows):
        return
    found = _keys(rows)
    for column in rule.needs:
        if column not in found:
            raise DataError(
                f"expected a column {column!r}, found {found}. Map it: columns={{{column!r}: …}}."
                f"{header_hint(is_table)}",
                code="missing_column",
                file=file,
                column=column,
            )


def _unknown(
    rows: Sequence[Row], fits: Mapping[str, int], file: str, places: Sequence[Place], *, is_table: bool
) -> DataError:
    keys = _keys(rows)
    header = header_hint(is_table)
    if "completion" in keys and "prompt" not in keys:
        return DataError(
            f"expected prompt beside completion, found {keys}. For open-ended text, map it: "
            f'columns={{"text": "completion"}}.{header}',
            code="missing_column",
            file=file,
            column="prompt",
        )
    by_name = next((rule.name for rule in BY_NAME if all(map(rule.fits, rows))), None)
    named = "" if by_name is None else f" It is read as {by_name!r} only if you say so: format={by_name!r}."
    fitting = [rule for rule in RULES if fits.get(rule.name)]
    near = sorted(fitting, key=lambda rule: -fits[rule.name])[:NEAREST]
    told = "; ".join(f"{rule.name!r} ({rule.keys}), fitting {fits[rule.name]}" for rule in near)
    nearest = f"Nearest: {told} of {len(rows)} rows. " if told else "None fits any row. "
    if near and places:
        unfit = [str(place) for place, row in zip(places, rows, strict=True) if not near[0].fits(row)]
        more = f" and {len(unfit) - NEAREST} more" if len(unfit) > NEAREST else ""
        nearest += f"{near[0].name!r} does not fit {', '.join(unfit[:NEAREST])}{more}. "
    return DataError(
        f"expected rows in one of the known formats (docs/formats.md), found the keys {keys}. {nearest}"
        f"Map columns: columns={_mapping(keys)}.{named}{header}",
        code="unknown_format",
        file=file,
    )


def _mapping(keys: Sequence[str]) -> str:
    """Known names for keys that differ from them in case alone, or what a mapping looks like."""
    known = {name for rule in RULES for name in rule.names}
    found = {key.lower(): key for key in keys if key not in known and key.lower() in known}
    return str(found) if found else '{"prompt": …, "completion": …}'


def _keys(rows: Sequence[Row]) -> list[str]:
    return sorted(
        {str(key) for row in rows for key, value in row.items() if value is not None and key != "_source"}
    )
