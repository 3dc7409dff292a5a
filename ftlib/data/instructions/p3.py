"""P3: prompts that promptsource rendered already, with their targets, and candidates that are wrong.

Source: Sanh et al. 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from ftlib.data.instructions.layout import Instructed
from ftlib.data.instructions.task import column, string
from ftlib.data.segments import Row, Segment, Skipped
from ftlib.errors import DataError

__all__ = ["P3", "p3"]


@final
@dataclass(frozen=True)
class P3:
    """See `p3`."""

    separator: str = "\n"

    def __call__(self, row: Row) -> Instructed | Skipped:
        """The prompt and its target; a wrong candidate is left out."""
        if column(row, "is_correct") is False:
            return Skipped("not_correct")
        asked = string(row, "inputs", "inputs_pretokenized", "prompt")
        if asked is None:
            raise DataError(f"expected inputs, found {sorted(row)}.", code="missing_column", column="inputs")
        target = string(row, "targets", "targets_pretokenized", "completion")
        return Instructed(
            (Segment(asked + self.separator, "prompt"),),
            None if target is None else target.strip(),
            ({"role": "user", "content": asked},),
        )

    def row(self, prompt: str) -> Row:
        """A bare prompt is an input."""
        return {"inputs": prompt}


def p3(*, separator: str = "\n") -> P3:
    """Rows with `inputs` and `targets`, perhaps `is_correct`.

    Rows where `is_correct` is false are candidates for ranking: they are never trained, and the report
    counts them as ``not_correct``.

    Args:
        separator: between the two, part of the prompt.
    """
    return P3(separator)
