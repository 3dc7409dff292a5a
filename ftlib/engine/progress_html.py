"""Progress of a run as one self-contained piece of HTML: a heading, a curve and a table of all metrics.

No script, nothing loaded, every text escaped. Lines differ in dashes as well as in colour.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ftlib.engine.progress_text import duration, metric_name, metric_text

__all__ = ["ROWS_SHOWN", "curve_svg", "progress_html"]

ROWS_SHOWN = 50  # newest entries in the table; the curve shows the whole run
POINTS_SHOWN = 400
WIDTH, HEIGHT, MARGIN = 480, 160, 44  # pixels
_STYLES = {"loss": ("#0072b2", ""), "eval_loss": ("#d55e00", ' stroke-dasharray="6 3"')}


def progress_html(step: int, total: int, left: float | None, rows: Sequence[Mapping[str, Any]]) -> str:
    """A run's progress so far.

    Args:
        step: steps completed.
        total: steps planned, 0 when unknown.
        left: seconds to go, None when unknown.
        rows: log entries in order, each with "step"; the columns are all metrics of any of them.
    """
    heading = f"step {step:,} of {total:,}" if total else f"step {step:,}"
    if left is not None:
        heading += f", {duration(left)} left"
    return f"<div><p><b>{escape(heading)}</b></p>{curve_svg(rows)}{_table(rows)}</div>"


def curve_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """Training and evaluation loss over steps, as inline SVG; empty before there are two points of one.

    Entries that are not finite leave a gap nowhere but are not drawn.
    """
    curves = {name: _points(rows, name) for name in _STYLES}
    if max(len(points) for points in curves.values()) < 2:
        return ""
    steps = [step for points in curves.values() for step, _ in points]
    values = [value for points in curves.values() for _, value in points]
    x0, x1, y0, y1 = min(steps), max(steps), min(values), max(values)
    across, down = (WIDTH - 2 * MARGIN) / ((x1 - x0) or 1), (HEIGHT - 2 * MARGIN) / ((y1 - y0) or 1)
    lines, legend = [], []
    for name, (colour, dashes) in _STYLES.items():
        if not curves[name]:
            continue
        drawn = " ".join(
            f"{MARGIN + (step - x0) * across:.1f},{MARGIN + (y1 - value) * down:.1f}"
            for step, value in curves[name]
        )
        lines.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}/>')
        legend.append(f'<tspan fill="{colour}">{"- - " if dashes else "— "}{name} </tspan>')
    bottom, right = HEIGHT - MARGIN, WIDTH - MARGIN
    labels = [
        f'<text x="{MARGIN - 4}" y="{MARGIN + 4}" text-anchor="end">{y1:.4g}</text>',
        f'<text x="{MARGIN - 4}" y="{bottom}" text-anchor="end">{y0:.4g}</text>',
        f'<text x="{MARGIN}" y="{bottom + 16}">{x0:g}</text>',
        f'<text x="{right}" y="{bottom + 16}" text-anchor="end">step {x1:g}</text>',
        f'<text x="{MARGIN}" y="{MARGIN - 14}">{"".join(legend)}(nats)</text>',
    ]
    axes = f'<path d="M{MARGIN} {MARGIN}V{bottom}H{right}" fill="none" stroke="currentColor" opacity="0.5"/>'
    return (
        f'<svg role="img" aria-label="loss over steps" width="{WIDTH}" height="{HEIGHT}" '
        f'font-size="11" fill="currentColor">{axes}{"".join(lines)}{"".join(labels)}</svg>'
    )


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    points = [
        (float(row["step"]), float(row[name]))
        for row in rows
        if isinstance(row.get(name), (int, float)) and math.isfinite(row[name])
    ]
    stride = math.ceil(len(points) / POINTS_SHOWN) or 1
    return points[::-1][::stride][::-1]  # counted from the newest, which is always shown


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f'<th style="text-align:right">{escape(metric_name(name))}</th>' for name in names)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:right">{_cell(row, name)}</td>' for name in names) + "</tr>"
        for row in rows[-ROWS_SHOWN:]
    )
    note = f"<p>the last {ROWS_SHOWN} of {len(rows):,} entries</p>" if len(rows) > ROWS_SHOWN else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def _cell(row: Mapping[str, Any], name: str) -> str:
    return escape(metric_text(name, row[name])) if name in row else ""
