"""Bad rows: raised all at once, or skipped and written down, beside their file or where the user says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import get_worker_info

from ftlib.data.problems import REJECTED, gathered, rejected_entry
from ftlib.data.reading import Located
from ftlib.errors import ConfigError, DataError

__all__ = [
    "OnError",
    "Rejects",
    "add_rejected",
    "beside",
    "check_rejected_file",
    "check_share",
    "of_worker",
    "write_rejected",
]

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


def check_rejected_file(path: Path | None, on_error: OnError) -> None:
    """Refuse a place for bad rows that is of no use, or that holds something else.

    Raises:
        ConfigError: as said.
    """
    if path is None:
        return
    if on_error != "skip":
        raise ConfigError(
            f"load_records: rejected_file has no effect with on_error={on_error!r}, which raises bad rows. "
            'Give on_error="skip".'
        )
    if path.exists() and not _is_ours(path):
        raise ConfigError(
            f"load_records: expected rejected_file as a new file or one of rejected rows, got {path}, which "
            "holds something else. Name another."
        )


def beside(source: Path) -> Path:
    """``<stem>_rejected.jsonl`` beside a file, with a number where a file of others has that name."""
    stem = source.name.split(".")[0]
    path = source.with_name(f"{stem}_rejected.jsonl")
    k = 1
    while path.exists() and not _is_ours(path):
        path = source.with_name(f"{stem}_rejected ({k}).jsonl")
        k += 1
    return path


def of_worker(path: Path) -> Path:
    """The file of this process: each worker of a `DataLoader` reads rows of its own and writes its own."""
    worker = get_worker_info()
    return path if worker is None else path.with_name(f"{path.stem}_worker{worker.id}{path.suffix}")


def write_rejected(rejects: Rejects, path: Path) -> None:
    """Write bad rows, each with its place and reason, in place of those of an earlier run."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(_lines(rejects), encoding="utf-8")
    partial.replace(path)


def add_rejected(rejects: Rejects, path: Path) -> None:
    """Add bad rows to those that are written."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(rejects))


def _lines(rejects: Rejects) -> str:
    entries = [rejected_entry(error, _content(located)) for located, error in rejects]
    return "".join(f"{json.dumps(entry, default=str)}\n" for entry in entries)


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
