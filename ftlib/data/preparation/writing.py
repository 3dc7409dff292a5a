"""What a run leaves on disk: data, report, and what could not be read."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ftlib.data.preparation.names import Names, names_for, stem_of
from ftlib.data.preparation.publish import Draft, publish
from ftlib.data.preparation.report import changes, flat_rows
from ftlib.data.preparation.run import Outcome
from ftlib.data.preparation.settings import Settings
from ftlib.data.preparation.table import Row
from ftlib.data.preparation.values import legible
from ftlib.data.problems import SHOWN
from ftlib.errors import ConfigError, DataError

__all__ = ["earlier_report", "has_something_to_write", "line_of", "write_all"]

_DEFAULTS = Settings().to_dict()
_LARGEST_REPORT = 1 << 26  # bytes; no report of ours is longer


def has_something_to_write(outcome: Outcome) -> bool:
    """Some fix was applied, a split, or rows left out because they could not be read."""
    return bool(outcome.applied) or outcome.context.intake.rejects.count > 0


def write_all(outcome: Outcome, report: dict[str, Any], folder: Path | None) -> list[Path]:
    """Write the outcome, whole or not at all, and complete the report.

    Args:
        outcome: of the checks.
        report: gets the names, sizes and hashes of what was written.
        folder: where to; `None` is beside the source.

    Returns:
        The data files, the report last.

    Raises:
        ConfigError: files of one name.
        DataError: ``not_written``: the folder cannot be written to, the disk is full, or another program
            has just taken one of the names.
    """
    names = names_for(_stems(outcome, folder), split=outcome.context.sides is not None)
    try:
        _write_to(names, outcome, report)
    except OSError as error:
        raise DataError(
            f"expected to write here, got {error.strerror or error}. Nothing was left behind. Check the "
            "folder and its free space, or name another one.",
            code="not_written",
            file=str(names.report.parent),
        ) from error
    return [*names.data, names.report]


def _write_to(names: Names, outcome: Outcome, report: dict[str, Any]) -> None:
    names.report.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:

        def draft(path: Path) -> Draft:
            made = Draft(path)
            stack.callback(made.discard)
            return made

        data = [draft(path) for path in names.data]
        _write_data(outcome, data)
        drafts = list(data)
        report["outputs"] = {each.path.name: each.rows for each in data}
        report["hashes"] = {each.path.name: each.sha256 for each in data}
        rejects = outcome.context.intake.rejects
        if rejects.count:
            drafts.append(draft(names.rejected))
            with rejects.path.open(encoding="utf-8") as lines:
                drafts[-1].write_lines(line.rstrip("\n") for line in lines)
            report["rejected"]["file"] = names.rejected.name
        if _is_cut(report):
            drafts.append(draft(names.rows))
            drafts[-1].write_lines(_all_rows(outcome))
            _point_to(report, names)
        drafts.append(draft(names.report))
        drafts[-1].write(legible(json.dumps(report, ensure_ascii=False, indent=1)) + "\n")
        for each in drafts:
            each.finish()
        publish(drafts)


def line_of(row: Row, *, is_pairs: bool) -> str:
    """A row as JSON; rows that are no pairs as they came."""
    if not is_pairs:
        return row.completion
    return json.dumps({"prompt": row.prompt, "completion": row.completion}, ensure_ascii=False)


def earlier_report(folder: Path, shas: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any] | None:
    """The report of an earlier run that has nothing left to do here, if there is one.

    Either it prepared this very input with these options, or this input is what it wrote. `_path` of the
    report says where it stands, `_made` that it is the latter: its findings are about other rows then.
    """
    for path in sorted(folder.glob("*.report.json")):
        if path.name.endswith(".rows.report.json") or path.stat().st_size > _LARGEST_REPORT:
            continue
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            files = report["input"].get("files", [report["input"]])
            same = tuple(file["sha256"] for file in files) == shas and report["options"] == options
            same = same and all((folder / name).is_file() for name in report["outputs"])
            made = set(shas) <= set(report["hashes"].values()) and options in (report["options"], _DEFAULTS)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # another program's file
        if same or made:
            return {**report, "_path": str(path), "_made": not same}
    return None


def _stems(outcome: Outcome, folder: Path | None) -> list[tuple[Path, str]]:
    stems = []
    for part in outcome.context.intake.parts:
        beside = part.path.parent if part.path is not None else None
        place = folder if folder is not None else beside
        if place is None:
            raise ConfigError("prepare: expected a folder to write data from memory to, got None.")
        stems.append((place, stem_of(part.facts.file)))
    if len(set(stems)) < len(stems):
        raise ConfigError(
            f"prepare: expected files of different names, got {[stem for _, stem in stems]}. "
            "Prepare them apart."
        )
    return stems


def _write_data(outcome: Outcome, drafts: list[Draft]) -> None:
    context = outcome.context
    table, sides = context.table, context.sides
    if sides is not None:
        for draft, order in zip(drafts, (sides.train, sides.valid), strict=True):
            draft.write_lines(line_of(row, is_pairs=True) for row in table.rows(order.tolist()))
        return
    starts = [start for start, _ in context.intake.spool.starts()]
    for row in table.rows():
        part = bisect_right(starts, row.number) - 1 if len(drafts) > 1 else 0
        drafts[part].write(line_of(row, is_pairs=context.is_pairs) + "\n")


def _is_cut(report: dict[str, Any]) -> bool:
    """Whether the report names fewer rows than there are."""
    return report["changes"]["count"] > SHOWN or any(_finding_is_cut(each) for each in report["findings"])


def _finding_is_cut(finding: dict[str, Any]) -> bool:
    return finding["count"] > len(finding["rows"]) and len(finding["rows"]) >= SHOWN


def _point_to(report: dict[str, Any], names: Names) -> None:
    for each in report["findings"]:
        if _finding_is_cut(each):
            each["rows_file"] = names.rows.name
    if report["changes"]["count"] > SHOWN:
        report["changes"]["rows_file"] = names.rows.name


def _all_rows(outcome: Outcome) -> Iterator[str]:
    """One JSON object over many lines: all rows of each finding, and the whole log of changes."""
    label = outcome.context.intake.spool.label
    yield '{"findings": {'
    found: dict[str, list[int]] = {}
    for reported in outcome.findings:
        found.setdefault(reported.check, []).extend(flat_rows(reported))
    for position, (check, rows) in enumerate(found.items(), start=1):
        comma = "," if position < len(found) else ""
        yield f"{json.dumps(check)}: {json.dumps([label(row) for row in rows])}{comma}"
    yield '}, "changes": ['
    previous = None
    for change in changes(outcome):
        if previous is not None:
            yield previous + ","
        previous = json.dumps(change)
    yield (previous or "") + "]}"
