"""What one pass over the rows finds, for all checks that look into every row."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from ftlib.data.preparation.affixes import without
from ftlib.data.preparation.sensitive import masked, pii, secrets
from ftlib.data.preparation.table import Row, Table
from ftlib.data.preparation.tokens import estimated_tokens
from ftlib.data.transforms.normalise import normalise

__all__ = ["Scan", "Sensitive"]

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_LEAST_ANSWER = 4  # characters from which on an answer in its prompt is no coincidence
_EXAMPLES = 20


def _rows() -> array[int]:
    return array("q")


@final
@dataclass
class Sensitive:
    """Rows with values that should not be in training data, and how they look, masked."""

    rows: array[int] = field(default_factory=_rows)
    kinds: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: int, found: list[tuple[str, str]]) -> None:
        """The values of one row."""
        self.rows.append(row)
        self.kinds.update({kind for kind, _ in found})
        for kind, value in found:
            if len(self.examples) < _EXAMPLES:
                self.examples.append({"row": row, "kind": kind, "value": masked(value)})


@final
@dataclass
class Scan:
    """Rows of the spool, by what was found in them.

    Args:
        prompt_keys: a hash of the normalised prompt of each row; 0 where nothing is left of it.
        completion_keys: a hash of the normalised completion of each row.
        empty_prompt: the prompt is empty or blank, but for the separator.
        trailing_blank: the prompt ends in a blank, before the separator.
        answer_in_prompt: the prompt holds the completion.
        separator_in_completion: the separator stands in the completion.
        control: control characters other than tab and line ends.
        pii: personal data.
        secret: keys and passwords.
        tokens: estimated tokens of each row.
    """

    prompt_keys: array[int] = field(default_factory=_rows)
    completion_keys: array[int] = field(default_factory=_rows)
    empty_prompt: array[int] = field(default_factory=_rows)
    trailing_blank: array[int] = field(default_factory=_rows)
    answer_in_prompt: array[int] = field(default_factory=_rows)
    separator_in_completion: array[int] = field(default_factory=_rows)
    control: array[int] = field(default_factory=_rows)
    pii: Sensitive = field(default_factory=Sensitive)
    secret: Sensitive = field(default_factory=Sensitive)
    tokens: array[int] = field(default_factory=_rows)

    @classmethod
    def of(cls, table: Table, separator: str | None, ending: str | None, *, is_pairs: bool) -> Scan:
        """One pass over `table`, whose prompts end in `separator` and whose completions in `ending`."""
        scan = cls()
        for given, row in table.both() if is_pairs else ((row, row) for row in table.rows()):
            scan.tokens.append(estimated_tokens(len(row.prompt.encode()) + len(row.completion.encode())))
            scan._look_for_values(
                row.number, f"{given.prompt}\n{given.completion}" if is_pairs else given.prompt
            )
            if is_pairs:
                scan._look_at_pair(row, separator, ending)
        return scan

    def _look_for_values(self, index: int, text: str) -> None:
        """What editing does not change, in the text as it came."""
        if _CONTROL.search(text) is not None:
            self.control.append(index)
        if found := list(pii(text)):
            self.pii.add(index, found)
        if found := list(secrets(text)):
            self.secret.add(index, found)

    def _look_at_pair(self, row: Row, separator: str | None, ending: str | None) -> None:
        prompt, completion = without(row.prompt, separator), without(row.completion, ending)
        asked, answer = normalise(prompt), normalise(completion)
        self.prompt_keys.append(hash(asked) if asked else 0)
        self.completion_keys.append(hash(answer))
        if not prompt.strip():
            self.empty_prompt.append(row.number)
        if prompt[-1:].isspace():
            self.trailing_blank.append(row.number)
        if len(answer) >= _LEAST_ANSWER and answer in asked:
            self.answer_in_prompt.append(row.number)
        if separator and separator in completion:
            self.separator_in_completion.append(row.number)

    def conflicting(self, rows: NDArray[np.int64]) -> list[list[int]]:
        """Groups of rows of one prompt with different completions, each in order, by first row."""
        keys = np.array(self.prompt_keys, dtype=np.int64)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        completions = np.array(self.completion_keys, dtype=np.int64)[order]
        groups = np.cumsum(np.r_[0, np.diff(keys) != 0])
        differ = (np.diff(groups) == 0) & (np.diff(completions) != 0) & (keys[1:] != 0)
        wanted = np.unique(groups[1:][differ])
        starts, ends = np.searchsorted(groups, wanted), np.searchsorted(groups, wanted, side="right")
        return sorted(rows[order[start:end]].tolist() for start, end in zip(starts, ends, strict=True))
