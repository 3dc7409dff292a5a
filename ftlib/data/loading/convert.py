"""One row to its records, columns renamed and unused ones kept aside."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, final

from ftlib.data.formats import Dropped, FormatOptions, Rule
from ftlib.data.loading.choose import Choice
from ftlib.data.preferences import ranks_of
from ftlib.data.problems import describe
from ftlib.data.reading import Located
from ftlib.data.segments import Row
from ftlib.errors import DataError

__all__ = ["Converter", "Pairs", "renamed"]

Pairs = Literal["best_worst", "all"]
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of surrogate pairs
# Columns that say what a record is; those that a reward may read beside a prompt are not among them.
_CANONICAL = frozenset(
    {
        *(
            "text",
            "prompt",
            "completion",
            "messages",
            "chosen",
            "rejected",
            "margin",
            "segments",
            "input_ids",
        ),
        *("labels", "loss_weights", "prompt_ids", "chosen_ids", "rejected_ids", "label", "text_a", "text_b"),
    }
)
_SIDES = ("prompt", "completion", "chosen", "rejected", "answers")  # each text or messages
_MESSAGES = ("messages", "prompt", "completion", "chosen", "rejected")


@final
@dataclass
class Converter:
    """Rows to records of one choice of format; it counts what is worth telling.

    Args:
        choice: the format.
        options: what the user said about the rows.
        columns: canonical name -> name in the source.
        pairs: makes pairs of ranked answers: the best with the worst, or every two of different rank.
        moved: columns that were kept aside.
        notes: what else happened, by name.
    """

    choice: Choice
    options: FormatOptions
    columns: Mapping[str, str]
    pairs: Pairs | None = None
    moved: set[str] = field(default_factory=set)
    notes: Counter[str] = field(default_factory=Counter)
    _kinds: dict[str, str] = field(default_factory=dict)

    def __call__(self, located: Located) -> list[dict[str, Any]] | Dropped:
        """The records of a row, or why it is left out.

        Raises:
            DataError: a bad row, located.
        """
        if isinstance(located.value, DataError):
            raise located.value
        place = located.place
        row = renamed(located.value, self.columns)
        try:
            made = self._records(row)
        except DataError as error:
            raise error.replaced(file=place.file, row=place.row, sheet=place.sheet) from error
        source = row.get("_source")
        source = source if isinstance(source, str) and source else str(place)
        return made if isinstance(made, Dropped) else [{**record, "_source": source} for record in made]

    def _records(self, row: Row) -> list[dict[str, Any]] | Dropped:
        if not _writable(row):
            for name, value in row.items():
                _check_writable(value, name)
        rule = self.choice.of(row)
        if rule is None:
            return [dict(row)]
        made = rule.convert(row, self.options)
        if isinstance(made, Dropped):
            return made
        records = [
            each for record in (made if isinstance(made, list) else [made]) for each in self._paired(record)
        ]
        return [self._whole(record, row, rule) for record in records]

    def _paired(self, record: dict[str, Any]) -> Iterable[dict[str, Any]]:
        """The pairs of ranked answers, if pairs are asked for."""
        if self.pairs is None or "answers" not in record:
            return [record]
        answers = record["answers"]
        ranks = ranks_of(record) or [float(k) for k in range(len(answers))]
        order = sorted(range(len(answers)), key=ranks.__getitem__)
        compared = list(combinations(order, 2)) if self.pairs == "all" else [(order[0], order[-1])]
        self.notes["ties, skipped"] += sum(ranks[i] == ranks[j] for i, j in compared)
        common: dict[str, Any] = {name: record[name] for name in ("prompt", "tools") if name in record}
        return [
            {**common, "chosen": answers[i], "rejected": answers[j]}
            for i, j in compared
            if ranks[i] != ranks[j]
        ]

    def _whole(self, record: dict[str, Any], row: Row, rule: Rule) -> dict[str, Any]:
        """The record with the columns of its row that were not read."""
        self._check_like_the_first(record)
        self._count_unknown_keys(record)
        read = {*rule.reads(row), *(["tools"] if "tools" in record or not row.get("tools") else [])}
        kept = {}
        for name, value in row.items():
            if name in read:
                continue
            if name in record or (name in _CANONICAL and rule.name != "prompt"):
                name = _free(f"extra_{name}", row)
                self.moved.add(name)
            kept[name] = value
        return {**record, **kept}

    def _check_like_the_first(self, record: Mapping[str, Any]) -> None:
        """One column holds text or messages, never some of each."""
        for name in _SIDES:
            value = record.get(name)
            if value is None:
                continue
            whole = value[0] if name == "answers" else value
            kind = "text" if isinstance(whole, str) else "messages"
            if self._kinds.setdefault(name, kind) != kind:
                raise DataError(
                    f"expected {self._kinds[name]}, as in the first row, got {kind}. "
                    "Load the two kinds apart.",
                    column=name,
                    excerpt=describe(value),
                )

    def _count_unknown_keys(self, record: Mapping[str, Any]) -> None:
        for name in _MESSAGES:
            value = record.get(name)
            for message in value if isinstance(value, list) else ():
                for key in json.loads(message["extra"]) if "extra" in message else ():
                    self.notes[f"messages with the unknown key {key!r}"] += 1


def renamed(row: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """Source columns under their canonical names; a column that stood there is kept aside.

    Example:
        >>> renamed({"question": "q", "prompt": "old"}, {"prompt": "question"})
        {'prompt': 'q', 'extra_prompt': 'old'}
    """
    if not columns:
        return dict(row)
    names = {given: canonical for canonical, given in columns.items()}
    taken = {names[name]: value for name, value in row.items() if name in names}
    kept = {
        (_free(f"extra_{name}", row) if name in taken else name): value
        for name, value in row.items()
        if name not in names
    }
    return {**taken, **kept}


def _free(name: str, row: Row) -> str:
    while name in row:
        name = f"extra_{name}"
    return name


def _check_writable(value: Any, column: str) -> None:
    """Refuse characters that no text file or tokenizer can hold."""
    if isinstance(value, str):
        if (found := _UNWRITABLE.search(value)) is not None:
            at = found.start()
            raise DataError(
                f"expected text, got the character U+{ord(value[at]):04X} at position {at}. Remove it.",
                column=column,
                excerpt=ascii(value[max(0, at - 20) : at + 20]),
            )
    elif isinstance(value, Mapping):
        for name, item in value.items():
            _check_writable(name, f"{column}.{name!a}")
            _check_writable(item, f"{column}.{name}")
    elif isinstance(value, list | tuple):
        for k, item in enumerate(value):
            _check_writable(item, f"{column}[{k}]")


def _writable(value: Any) -> bool:
    """Whether no text inside holds such a character."""
    if isinstance(value, str):
        return (value.isascii() and "\0" not in value) or _UNWRITABLE.search(value) is None
    if isinstance(value, Mapping):
        return all(map(_writable, value)) and all(map(_writable, value.values()))
    return all(map(_writable, value)) if isinstance(value, list | tuple) else True
