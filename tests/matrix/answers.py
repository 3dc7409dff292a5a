"""What the library answers to a cell of the matrix: asked of trainers as they are made, never of names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from ftlib.errors import FtlibError
from ftlib.models.adapted import why_not_off
from ftlib.models.plan import plan_for
from tests.matrix.columns import COLUMNS
from tests.matrix.rows import ROWS

__all__ = ["CELLS", "PADDED", "REFUSED", "SNAPSHOT", "WORKS", "Answer", "answer"]

WORKS, PADDED, SNAPSHOT, REFUSED = "✓", "✓p", "S", "R"
CELLS = {f"{row.name}, {column.name}": (row, column) for row in ROWS for column in COLUMNS}


@dataclass(frozen=True)
class Answer:
    """A sign of the table, and why where it is a refusal."""

    sign: str
    reason: str = ""


@cache
def answer(cell: str) -> Answer:
    """Works, works on padded rows, works with a snapshot as the only reference, or is refused."""
    row, column = CELLS[cell]
    try:
        trainer = column.make(row)
    except FtlibError as refusal:
        return Answer(REFUSED, str(refusal))
    refers = hasattr(trainer, "reference") or hasattr(trainer.engine.objective, "reference")
    if refers and why_not_off(trainer.model) is not None:
        return Answer(SNAPSHOT)
    if column.name.endswith("grouped") and plan_for(trainer.model).path == "padded":
        return Answer(PADDED)
    return Answer(WORKS)
