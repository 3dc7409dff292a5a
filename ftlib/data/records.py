"""Any source to canonical records, each row knowing where it came from."""

from __future__ import annotations

import logging
import random
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset

from ftlib.data.detect import RULES, Rule, detect, rule_named
from ftlib.data.messages import ROLES
from ftlib.data.preferences import ranks_of
from ftlib.data.problems import describe, gathered
from ftlib.data.reading import read_table
from ftlib.data.tables import to_dataset
from ftlib.errors import ConfigError, DataError

__all__ = ["load_records"]

_log = logging.getLogger(__name__)
_LOOKED_AT = 256  # first rows that decide the format, and as many drawn from the rest
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of surrogate pairs
# Columns that say what a record is. `answers` beside a prompt alone may be a reward's own column.
_CANONICAL = {column for rule in RULES for column in rule.columns} - {"answers"}
_SIDES = ("prompt", "completion", "chosen", "rejected", "answers")  # each text or messages

Located = tuple[str, int, dict[str, Any] | DataError]


def load_records(
    source: Any,
    *,
    format: str = "auto",  # noqa: A002  the name users know
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
) -> Dataset:
    r"""Records in canonical columns: `text`; `prompt` and `completion`; `messages`; `prompt` alone;
    `[prompt,] chosen, rejected[, margin]`; or `prompt, answers[, ranks | scores]`.

    `tools` stay beside messages. Other columns are kept; one that bears a canonical name of another
    format becomes ``extra_<name>``, which is logged. `_source` holds ``file:row``.

    Preferences come in many spellings (`accepted`, `response_chosen`, `question`, ...; see
    `ftlib.data.spellings`). A prompt inside both sides is taken out: of message lists the messages that
    both begin with, of dialogues written as ``\n\nHuman:`` and ``\n\nAssistant:`` all before the last
    answer. `answers` are ranked by `ranks` (1 = best, equal ranks tie), by `scores` (higher is better), or
    else by their order, which is logged. No margin is made of scores.

    Args:
        source: a path or several (`.jsonl`, `.json`, `.csv`, `.parquet`), a `datasets.Dataset`, a pandas
            frame, or a list of dicts. It is never changed.
        format: ``"auto"`` looks at the first 256 rows and 256 more; or the name of a rule in
            `ftlib.data.detect`; or ``"rows"``, which takes rows as they are, for a formatter of your own.
        columns: canonical name -> name in the source.
        roles: further spelling of a role -> system, user, assistant or tool.

    Raises:
        DataError: every bad row at once, the first 20 in full; or what is wrong with a whole source.
        ConfigError: an unknown format, or a source of no known kind.
    """
    spellings = {**ROLES, **_checked_roles(roles or {})}
    located = list(_located(source))
    problems = [row for _, _, row in located if isinstance(row, DataError)]
    rows = [(file, number, row) for file, number, row in located if not isinstance(row, DataError)]
    if not located:
        raise DataError("expected rows, got none.", code="empty_data", file=_name(source))
    if not rows:
        raise gathered(problems)
    if columns:
        rows = _renamed(rows, columns)
    rule = None
    if format == "auto":
        rule = detect([row for _, _, row in _looked_at(rows)], file=rows[0][0])
    elif format != "rows":
        rule = rule_named(format)
        _require(rule, rows)
    made: list[dict[str, Any]] = []
    kinds: dict[str, str] = {}
    for file, number, row in rows:
        try:
            canonical = _canonical(row, rule, spellings, kinds)
            made.append({**canonical, "_source": row.get("_source") or f"{file}:{number}"})
        except DataError as error:
            problems.append(_at(error, file, number))
    if problems:
        order = {(file, number): place for place, (file, number, _) in enumerate(located)}
        raise gathered(sorted(problems, key=lambda e: order.get((str(e.file), e.row or 0), 0)))
    moved = [
        name for name in made[0] if name.startswith("extra_") and name.removeprefix("extra_") in _CANONICAL
    ]
    if moved:
        _log.warning(
            "load_records: read as %s; kept aside: %s", rule.name if rule else format, ", ".join(moved)
        )
    if rule and rule.name == "ranked" and not any(ranks_of(row) for row in made):
        _log.warning("load_records: answers without ranks or scores are read as best first.")
    return to_dataset(made)


def _located(source: Any) -> Iterator[Located]:
    """(file, row number, row) of everything in `source`."""
    if isinstance(source, (str, PathLike)):
        for located in read_table(Path(source)):
            yield str(source), located.place.row, located.value
    elif isinstance(source, Dataset):
        for number, row in enumerate(source.with_format(None), start=1):
            yield "<dataset>", number, dict(row)
    elif (pandas := sys.modules.get("pandas")) is not None and isinstance(source, pandas.DataFrame):
        plain = source.astype(object).where(source.notna(), None)
        for number, row in enumerate(plain.to_dict("records"), start=1):
            yield "<frame>", number, {str(name): value for name, value in row.items()}
    elif (
        isinstance(source, Sequence) and source and all(isinstance(part, (str, PathLike)) for part in source)
    ):
        for part in source:
            yield from _located(part)
    elif isinstance(source, Iterable) and not isinstance(source, (Mapping, bytes)):
        for number, row in enumerate(source, start=1):
            yield "<list>", number, _dict_or_error(row, number)
    else:
        raise ConfigError(
            f"load_records: expected a path, a datasets.Dataset, a pandas frame or a list of dicts, "
            f"got {type(source).__name__}."
        )


def _dict_or_error(row: Any, number: int) -> dict[str, Any] | DataError:
    if isinstance(row, Mapping):
        return dict(row)
    return DataError(
        f"expected a dict, got {describe(row)}.", file="<list>", row=number, excerpt=describe(row)
    )


def _name(source: Any) -> str:
    return str(source) if isinstance(source, (str, PathLike)) else f"<{type(source).__name__.lower()}>"


def _checked_roles(roles: Mapping[str, str]) -> Mapping[str, str]:
    wrong = sorted({role for role in roles.values() if role not in ROLES.values()})
    if wrong:
        raise ConfigError(
            f"load_records: expected roles to map to {sorted(set(ROLES.values()))}, got {wrong}."
        )
    return roles


def _looked_at(rows: Sequence[Any]) -> list[Any]:
    """The first rows and a sample of the rest, the same for the same data."""
    rest = rows[_LOOKED_AT:]
    sample = random.Random(0).sample(range(len(rest)), min(_LOOKED_AT, len(rest)))  # noqa: S311  no secret
    return [*rows[:_LOOKED_AT], *(rest[i] for i in sorted(sample))]


def _renamed(
    rows: Sequence[tuple[str, int, dict[str, Any]]], columns: Mapping[str, str]
) -> list[tuple[str, int, dict[str, Any]]]:
    """Source columns under their canonical names; a column that stood there is kept aside."""
    found = {name for _, _, row in rows for name in row}
    missing = sorted(set(columns.values()) - found)
    if missing:
        raise DataError(
            f"expected the columns {missing}, found {sorted(found)}. "
            "columns maps a canonical name to a name in the data.",
            code="missing_column",
            file=rows[0][0],
            column=missing[0],
        )
    names = {given: canonical for canonical, given in columns.items()}

    def rename(row: dict[str, Any]) -> dict[str, Any]:
        kept = {
            (f"extra_{name}" if name in columns else name): value
            for name, value in row.items()
            if name not in names
        }
        return {**{names[name]: value for name, value in row.items() if name in names}, **kept}

    return [(file, number, rename(row)) for file, number, row in rows]


def _require(rule: Rule, rows: Sequence[tuple[str, int, dict[str, Any]]]) -> None:
    """A column that no row has is one error, not one per row."""
    if any(rule.fits(row) for _, _, row in rows):
        return
    found = {name for _, _, row in rows for name, value in row.items() if value is not None}
    for column in rule.columns:
        if column not in found:
            raise DataError(
                f"expected a column {column!r}, found {sorted(found)}. Map it: columns={{{column!r}: …}}.",
                code="missing_column",
                file=rows[0][0],
                column=column,
            )


def _canonical(
    row: dict[str, Any], rule: Rule | None, roles: Mapping[str, str], kinds: dict[str, str]
) -> dict[str, Any]:
    for name, value in row.items():
        _writable(value, name)
    if rule is None:
        return row
    canonical = rule.canonical(row, roles)
    _like_the_first(canonical, kinds)
    read = {*rule.reads(row), *(["tools"] if "tools" in canonical or not row.get("tools") else [])}
    kept = {
        (f"extra_{name}" if name in _CANONICAL or name in canonical else name): value
        for name, value in row.items()
        if name not in read
    }
    return {**canonical, **kept}


def _like_the_first(canonical: Mapping[str, Any], kinds: dict[str, str]) -> None:
    """One column holds text or messages, never some of each; `kinds` remembers what it held first."""
    for name in _SIDES:
        value = canonical.get(name)
        if value is None:
            continue
        whole = value[0] if name == "answers" else value
        kind = "text" if isinstance(whole, str) else "messages"
        if kinds.setdefault(name, kind) != kind:
            raise DataError(
                f"expected {kinds[name]}, as in the first row, got {kind}. Load the two kinds apart.",
                column=name,
                excerpt=describe(value),
            )


def _writable(value: Any, column: str) -> None:
    """Refuse characters that no text file or tokenizer can hold."""
    if isinstance(value, str):
        found = _UNWRITABLE.search(value)
        if found:
            at = found.start()
            raise DataError(
                f"expected text, got the character U+{ord(value[at]):04X} at position {at}. Remove it.",
                column=column,
                excerpt=ascii(value[max(0, at - 20) : at + 20]),
            )
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _writable(item, f"{column}.{name}")
    elif isinstance(value, (list, tuple)):
        for k, item in enumerate(value):
            _writable(item, f"{column}[{k}]")


def _at(error: DataError, file: str, row: int) -> DataError:
    return DataError(
        error.message,
        code=error.code,
        file=file,
        row=row,
        column=error.column,
        byte=error.byte,
        excerpt=error.excerpt,
    )
