"""Bad rows: raised all at once, or skipped and written beside their file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ftlib.data.problems import REJECTED, gathered, rejected_entry
from ftlib.data.reading import Located
from ftlib.errors import DataError

__all__ = ["OnError", "Rejects", "check_share", "write_rejected"]

OnError = Literal["raise", "skip"]
Rejects = Sequence[tuple[Located, DataError]]


def check_share(problems: Sequence[DataError], rows: int, max_bad: float | None) -> None:
    """Refuse more bad rows than the user allows, and roles that are not known.

    Raises:
        DataError: as said; all problems at once.
    """
    unknown = [problem for problem in problems if problem.code == "unknown_role"]
    if unknown:  # a role that is mapped wrongly is wrong in all rows
        raise gathered(unknown)
    if max_bad is not None and len(problems) > max_bad * rows:
        error = gathered(problems)
        raise error.replaced(
            message=f"{error.message}\n{len(problems)} of {rows} rows are bad, more than max_bad={max_bad}."
        )


def write_rejected(rejects: Rejects, source: Path) -> Path:
    """Write bad rows to ``<stem>_rejected.jsonl`` beside their file, each with its place and reason.

    An earlier file of rejected rows is replaced; another file of that name is left alone.
    """
    stem = source.name.split(".")[0]
    path = source.with_name(f"{stem}_rejected.jsonl")
    k = 1
    while path.exists() and not _is_ours(path):
        path = source.with_name(f"{stem}_rejected ({k}).jsonl")
        k += 1
    entries = [rejected_entry(error, _content(located)) for located, error in rejects]
    lines = [json.dumps(entry, default=str) for entry in entries]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    partial.replace(path)
    return path


def _content(located: Located) -> Any:
    return located.raw if isinstance(located.value, DataError) else located.value


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        first = file.readline()
    try:
        entry = json.loads(first)
    except ValueError:
        return not first
    return isinstance(entry, dict) and set(REJECTED) <= set(entry)
