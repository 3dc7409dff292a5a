"""One run of ``python -m ftlib prepare`` in a folder of its own, and everything it left behind."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.__main__ import main

__all__ = ["Run", "execute", "lines", "pairs"]


@dataclass(frozen=True)
class Run:
    """What a run came to: its exit code, its report (or error), what it printed, the files it wrote."""

    exit: int
    report: dict[str, Any]
    said: str
    files: dict[str, bytes]

    @property
    def data(self) -> dict[str, list[Any]]:
        """Rows of the data files, by name."""
        return {
            name: [json.loads(line) for line in content.decode().split("\n") if line]
            for name, content in self.files.items()
            if name.endswith(".jsonl") and "_rejected" not in name
        }

    @property
    def records(self) -> list[Any]:
        """All rows written."""
        return [row for rows in self.data.values() for row in rows]

    @property
    def applied(self) -> list[str]:
        return [action["check"] for action in self.report["actions"] if action["applied"]]

    @property
    def checks(self) -> list[str]:
        return [finding["check"] for finding in self.report["findings"]]

    @property
    def error(self) -> dict[str, Any]:
        return self.report["error"]

    def finding(self, check: str) -> dict[str, Any]:
        """The only finding of a check, its data beside its other fields."""
        found = [each for each in self.report["findings"] if each["check"] == check]
        assert len(found) == 1, f"{check}: {len(found)} findings among {self.checks}"
        return {**found[0], **found[0]["data"]}

    def unaccounted(self) -> int:
        """Rows that came in and are neither kept, dropped with a reason, nor rejected: 0."""
        rows = self.report["rows"]
        return rows["read"] - rows["kept"] - rows["rejected"] - sum(rows["dropped"].values())


def execute(
    folder: Path, files: Mapping[str, str | bytes], *flags: str, answers: Sequence[str] | None = None
) -> Run:
    """Write `files`, prepare the first with `flags`, and see that none of them was changed.

    Args:
        folder: to work in.
        files: name -> content.
        flags: of the command; ``-q`` is added unless there are `answers`.
        answers: lines of standard input.
    """
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    before = _contents(folder)
    quiet = ["-q"] if answers is None and "--no" not in flags else []
    out, err = io.StringIO(), io.StringIO()
    typed, sys.stdin = sys.stdin, io.StringIO("".join(f"{answer}\n" for answer in answers or ()))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["prepare", str(folder / next(iter(files))), "--json", *quiet, *flags])
    finally:
        sys.stdin = typed
    after = _contents(folder)
    assert {name: after.get(name) for name in before} == before, "a source was changed"
    new = {name: content for name, content in after.items() if name not in before}
    assert not [name for name in new if name.startswith(".")], "something half-written was left"
    return Run(status, json.loads(out.getvalue()), err.getvalue(), new)


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as JSONL."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def pairs(*rows: tuple[Any, Any]) -> str:
    """(prompt, completion) as JSONL."""
    return lines([{"prompt": prompt, "completion": completion} for prompt, completion in rows])


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
