"""Rows that say nearly the same, or contradict each other, or stand in several files."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ftlib.data.preparation.check import Check, Context, Finding, Fix
from ftlib.data.preparation.words import counted
from ftlib.data.transforms import near_duplicates

__all__ = ["CONFLICTING_COMPLETION", "NEAR_DUPLICATE", "near_clusters"]


def near_clusters(context: Context) -> list[list[int]]:
    """Rows of the spool that resemble the first of their cluster; clusters of two rows or more."""
    table = context.table
    if "near" not in table.scans:
        texts = (f"{row.prompt} {row.completion}" if context.is_pairs else row.prompt for row in table.rows())
        centres = near_duplicates(texts, folder=context.intake.spool.folder)
        clusters: dict[int, list[int]] = {}
        for member in np.flatnonzero(centres != np.arange(len(centres))).tolist():
            clusters.setdefault(int(centres[member]), []).append(member)
        table.scans["near"] = [
            table.indices[[centre, *members]].tolist() for centre, members in sorted(clusters.items())
        ]
    found: list[list[int]] = table.scans["near"]
    return found


def _near_duplicate(context: Context) -> Iterator[Finding]:
    clusters = near_clusters(context)
    if not clusters:
        return
    rows = np.array(sorted(row for cluster in clusters for row in cluster[1:]), dtype=np.int64)
    yield Finding(
        f"{counted(len(clusters), 'cluster')} of near-duplicates, {counted(len(rows), 'row')} besides the "
        "first ones",
        clusters=clusters,
        data={"repeated": len(rows)},
        fix=Fix("off", f"Drop {counted(len(rows), 'near-duplicate')}", {"rows": len(rows)}, drop=rows),
    )


def _conflicting(context: Context) -> Iterator[Finding]:
    if context.task == "open-ended":
        return
    clusters = context.scan.conflicting(context.table.indices)
    if clusters:
        yield Finding(f"{counted(len(clusters), 'prompt')} with different completions", clusters=clusters)


NEAR_DUPLICATE = Check(
    "near_duplicate",
    "prompt and completion together resemble an earlier row: equal normalised, or Jaccard >= 0.9",
    _near_duplicate,
    "drop all but the first of each cluster",
    "off",
    pairs_only=False,
    added=True,
)
CONFLICTING_COMPLETION = Check(
    "conflicting_completion",
    "the same normalised prompt with different normalised completions",
    _conflicting,
    added=True,
)
