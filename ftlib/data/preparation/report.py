"""The report: what was found, what was done, and what inference has to know, as plain data for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ftlib.data.preparation.run import Outcome, Reported
from ftlib.data.preparation.source import Part
from ftlib.data.problems import SHOWN

__all__ = ["build_report", "changes", "flat_rows"]

VERSION = 1


def build_report(outcome: Outcome, shas: tuple[str, ...]) -> dict[str, Any]:
    """The report of a run that has not written anything yet.

    Args:
        outcome: of the checks.
        shas: SHA-256 of each part of the source.
    """
    context = outcome.context
    intake, table = context.intake, context.table
    count, shown = _counted(changes(outcome))
    return {
        "version": VERSION,
        "input": _input(intake.parts, shas, intake.rows),
        "options": context.settings.to_dict(),
        "task": context.task,
        "rows": {
            "read": intake.rows,
            "rejected": intake.rejects.count,
            "dropped": {check: len(rows) for check, rows in outcome.dropped.items()},
            "kept": len(table),
        },
        "findings": [_finding(outcome, reported) for reported in outcome.findings],
        "actions": [
            {
                "check": action.check,
                "kind": action.kind,
                "default": action.default,
                "applied": action.applied,
                "params": dict(action.params),
            }
            for action in outcome.actions
        ],
        "tokens": _tokens(outcome),
        "split": None if context.sides is None else context.sides.to_dict(),
        "positive_class": context.settings.positive_class,
        "outputs": {},
        "hashes": {},
        "rejected": {"count": intake.rejects.count, "rows": intake.rejects.rows, "file": None},
        "inference": _inference(outcome),
        "changes": {"count": count, "rows": shown, "rows_file": None},
    }


def changes(outcome: Outcome) -> Iterator[dict[str, Any]]:
    """The log of what became of each row that was changed or dropped: changed rows first, in order."""
    label = outcome.context.intake.spool.label
    for row, checks in outcome.context.table.changed_by():
        yield {"row": label(row), "changed": list(checks)}
    for check, rows in outcome.dropped.items():
        for row in rows.tolist():
            yield {"row": label(row), "dropped": check}


def flat_rows(reported: Reported) -> list[int]:
    """All rows of a finding, those of clusters one after the other."""
    finding = reported.finding
    if len(finding.clusters):
        return [row for cluster in finding.clusters for row in cluster]
    return [int(row) for row in finding.rows]


def _counted(entries: Iterable[dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
    """How many there are, and the first ones."""
    count = 0
    shown = []
    for count, entry in enumerate(entries, start=1):
        if count <= SHOWN:
            shown.append(entry)
    return count, shown


def _input(parts: tuple[Part, ...], shas: tuple[str, ...], rows: int) -> dict[str, Any]:
    files = [
        {
            "file": Path(part.facts.file).name,
            "sha256": sha,
            "format": part.facts.format,
            "shape": part.facts.shape,
            "compression": part.facts.compression,
            "encoding": part.facts.encoding,
            "delimiter": part.facts.delimiter,
            "sheet": part.facts.sheet,
        }
        for part, sha in zip(parts, shas, strict=True)
    ]
    return {**files[0], "rows": rows, **({"files": files} if len(files) > 1 else {})}


def _finding(outcome: Outcome, reported: Reported) -> dict[str, Any]:
    finding, label = reported.finding, outcome.context.intake.spool.label
    rows = flat_rows(reported)
    clusters = finding.clusters
    count = finding.count
    if count is None:
        count = len(clusters) if len(clusters) else len(rows)
    data = dict(finding.data)
    if len(clusters):
        data["clusters"] = [[label(row) for row in cluster[:SHOWN]] for cluster in clusters[:SHOWN]]
    if finding.fix is not None:
        data["default"] = "on" if finding.fix.default == "necessary" else finding.fix.default
    return {
        "check": reported.check,
        "level": reported.level,
        "message": finding.message,
        "count": count,
        "rows": [label(row) for row in rows[:SHOWN]],
        "rows_file": None,
        "data": data,
    }


def _tokens(outcome: Outcome) -> dict[str, Any]:
    """Lengths of the finished rows in tokens; `over` counts those over `max_length`."""
    context = outcome.context
    counter, limit = context.settings.counter, context.settings.max_length
    table = context.table
    if counter is None:
        lengths = np.array(context.scan.tokens, dtype=np.int64)
    else:
        texts = (row.prompt + row.completion if context.is_pairs else row.prompt for row in table.rows())
        lengths = np.fromiter(counter.lengths(texts), np.int64, len(table))
    p50, p95 = (int(np.percentile(lengths, share, method="higher")) for share in (50, 95))
    return {
        "p50": p50,
        "p95": p95,
        "max": int(lengths.max()),
        "over": int((lengths > limit).sum()),
        "limit": limit,
        "total": int(lengths.sum()),
        "by": "bytes / 3" if counter is None else counter.name,
    }


def _inference(outcome: Outcome) -> Mapping[str, Any]:
    """What a prompt needs at inference to look as in training."""
    context = outcome.context
    if not context.is_pairs:
        return {"separator": None, "ending": None, "stop": [], "leading_space": None, "removed_prefix": None}
    survey = context.table.survey("completion")
    return {
        "separator": context.separator,
        "ending": context.ending,
        "stop": [] if context.ending is None else [context.ending],
        "leading_space": survey.spaced == survey.rows,
        "removed_prefix": context.removed_prefix,
    }
