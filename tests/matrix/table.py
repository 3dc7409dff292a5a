"""The page of the matrix. ``python -m tests.matrix.table`` writes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tests.matrix.answers import CELLS, PADDED, REFUSED, SNAPSHOT, WORKS, Answer, answer
from tests.matrix.columns import COLUMNS
from tests.matrix.rows import ROWS

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adapters-matrix.md"

_HEAD = """# Adapters and trainers

Which adapter works under which trainer. This page is written by `python -m tests.matrix.table`, which makes
every trainer with every adapter and asks it; [tests](../tests/matrix/test_matrix.py) hold each cell to what
it says.

| Sign | Means |
|---|---|
"""
_SIGNS = {
    WORKS: "works",
    PADDED: "works, with each document in a padded row of its own",
    SNAPSHOT: "works; a reference is a copy of the trained weights, since switched off it is not its base",
    REFUSED: "refused when the trainer is made, with the reason below",
}


def page() -> str:
    """The whole page."""
    answers = {(row.name, column.name): answer(cell) for cell, (row, column) in CELLS.items()}
    legend = "".join(f"| {sign} | {meaning} |\n" for sign, meaning in _SIGNS.items())
    return "\n".join([_HEAD + legend, _table(answers), _refusals(answers)])


def _table(answers: Mapping[tuple[str, str], Answer]) -> str:
    head = ["Adapter", *(column.name for column in COLUMNS)]
    lines = [head, ["---"] * len(head)]
    lines += [[row.name, *(answers[row.name, column.name].sign for column in COLUMNS)] for row in ROWS]
    return "".join(f"|{'|'.join(line)}|\n" for line in lines)


def _refusals(answers: Mapping[tuple[str, str], Answer]) -> str:
    """Each message once, with the cells that give it."""
    cells: dict[str, list[tuple[str, str]]] = {}
    for cell, found in answers.items():
        if found.sign == REFUSED:
            cells.setdefault(found.reason, []).append(cell)
    lines = [
        "## What is refused, and what to do instead\n",
        "| Adapter | Trainer | Message |",
        "|---|---|---|",
    ]
    for reason, where in cells.items():
        adapters, trainers = (dict.fromkeys(names) for names in zip(*where, strict=True))
        lines.append(f"| {', '.join(adapters)} | {'; '.join(trainers)} | {_text(reason)} |")
    return "\n".join(lines) + "\n"


def _text(message: str) -> str:
    """Code marks around calls, so that a page shows them as they are."""
    return re.sub(r"(ftlib[\w.]*\\([^)]*\\))", r"`\\1`", message)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
