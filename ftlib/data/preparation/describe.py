"""The report in words, for people at a terminal."""

from __future__ import annotations

from typing import Any

from ftlib.data.preparation.words import counted

__all__ = ["describe_report"]


def describe_report(report: dict[str, Any]) -> str:
    """One line per finding, with the fixes that were applied, then sizes."""
    applied = [action["check"] for action in report["actions"] if action["applied"]]
    declined = [
        action["check"] for action in report["actions"] if not action["applied"] and action["default"] == "on"
    ]
    rows, tokens = report["rows"], report["tokens"]
    lines = [f"{report['input']['file']}: {counted(rows['read'], 'row')}, {report['task']}"]
    for finding in report["findings"]:
        mark = "!" if finding["level"] == "warn" else "-"
        lines.append(f"{mark} {finding['check']}: {finding['message']}{_rows(finding)}")
    lines.append(f"Applied: {', '.join(applied) or 'nothing'}.")
    if declined:
        lines.append(f"Declined: {', '.join(declined)}.")
    dropped = sum(rows["dropped"].values())
    left_out = f" ({dropped:,} dropped, {rows['rejected']:,} rejected)" if dropped or rows["rejected"] else ""
    lines.append(f"Left: {counted(rows['kept'], 'row')}{left_out}.")
    lines.append(
        f"About {tokens['total']:,} tokens per epoch (by {tokens['by']}): half of the rows have up to "
        f"{tokens['p50']:,}, the longest {tokens['max']:,}; {tokens['over']:,} over {tokens['limit']:,}. "
        "Training time grows with tokens times epochs."
    )
    lines += [f"Wrote {name}, {counted(count, 'row')}." for name, count in report["outputs"].items()]
    if report["rejected"]["file"] is not None:
        lines.append(f"Wrote {report['rejected']['file']}, the rows that could not be read.")
    return "\n".join(lines)


def _rows(finding: dict[str, Any]) -> str:
    rows = finding["rows"]
    if not rows or "clusters" in finding["data"]:
        return ""
    shown = ", ".join(map(str, rows[:5]))
    return f" (rows {shown}{', …' if len(rows) > 5 or finding['count'] > len(rows) else ''})"
