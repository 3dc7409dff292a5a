"""A report in one HTML file: sections of text, tables, curves, and answers side by side.

The file refers to nothing outside itself, holds no scripts, prints well, and shows whatever text a
model produced as text. Left out on purpose: live updates; a report is written once, at the end.
"""

from __future__ import annotations

import html
import io
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, final

from ftlib.errors import ConfigError, MissingPackageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Report"]

# Okabe and Ito's palette, told apart with any colour vision; line styles differ as well.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_STYLES = ("-", "--", "-.", ":")
_MARKED = 40  # series of so few points, such as evaluations, show each of them

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .8rem;
           margin: .4rem 0 1.6rem; break-inside: avoid; }
.answers div { border: 1px solid #ccc; border-radius: 4px; padding: .5rem .8rem; }
.answers h3 { font-size: .8rem; margin: 0 0 .3rem; color: #555; }
.answers p, .prompt { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { font-weight: 600; }
@media print { body { margin: 0; max-width: none; font-size: 11pt; } }
"""


@final
class Report:
    """Collects parts in order and writes them as one self-contained HTML file.

    Every string given to it is shown as text, never read as markup.

    Args:
        title: heading and window title.

    Example:
        >>> report = Report("A run")
        >>> report.section("Loss")
        >>> report.table([{"phase": "before", "loss": 2.5}, {"phase": "after", "loss": 1.25}])
        >>> "<td>before</td>" in report.html()
        True
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = []
        self._figures = 0

    def section(self, title: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{_escaped(title)}</h2>")

    def text(self, text: str) -> None:
        """Add paragraphs, separated by blank lines in `text`."""
        paragraphs = [part for part in text.split("\n\n") if part.strip()]
        self._parts += [f'<p dir="auto">{_escaped(part.strip())}</p>' for part in paragraphs]

    def table(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Add a table; the keys of the rows are its columns.

        Args:
            rows: at least one, all with the same keys in the same order. Floats are shown with four
                significant digits, integers with thousands separated.

        Raises:
            ConfigError: no rows, or rows with different columns.
        """
        columns = list(rows[0]) if rows else []
        odd = next((number for number, row in enumerate(rows, 1) if list(row) != columns), None)
        if not columns or odd is not None:
            found = "no rows" if not rows else f"row {odd} with {list(rows[(odd or 1) - 1])}"
            raise ConfigError(f"Report.table: expected rows with the columns {columns}, got {found}.")
        head = "".join(f"<th>{_escaped(column)}</th>" for column in columns)
        body = "".join("<tr>" + "".join(map(_cell, row.values())) + "</tr>\n" for row in rows)
        self._parts.append(f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>")

    def curve(self, series: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str) -> None:
        """Add a line chart.

        Args:
            series: name -> points (x, y), in the order in which they are joined.
            xlabel: what x is, with its unit.
            ylabel: what y is, with its unit.

        Raises:
            ConfigError: no series, or a series without points.
            MissingPackageError: matplotlib is not installed.
        """
        empty = [name for name, points in series.items() if not points]
        if empty or not series:
            raise ConfigError(
                f"Report.curve: expected series with points, got none for {empty or 'any name'}."
            )
        self._figures += 1
        svg = _svg(_line_chart(series, xlabel, ylabel), salt=f"figure-{self._figures}")
        label = _escaped(f"{ylabel} over {xlabel}: {', '.join(series)}")
        self._parts.append(f'<figure role="img" aria-label="{label}">{svg}</figure>')

    def answers(self, prompt: str, before: str, after: str, reference: str | None = None) -> None:
        """Add a prompt with its answers before and after training, and the reference if there is one."""
        columns = {"before": before, "after": after}
        if reference is not None:
            columns["reference"] = reference
        boxes = "".join(
            f'<div><h3>{name}</h3><p dir="auto">{_escaped(text)}</p></div>' for name, text in columns.items()
        )
        self._parts.append(
            f'<p class="prompt" dir="auto">{_escaped(prompt)}</p>\n<div class="answers">{boxes}</div>'
        )

    def html(self) -> str:
        """The page as it stands now."""
        title = _escaped(self._title)
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
            + "\n".join(self._parts)
            + "\n</body>\n</html>\n"
        )

    def write(self, path: str | Path) -> Path:
        """Write the page, creating its folder. The file appears whole or stays as it was.

        Returns:
            The path written.

        Raises:
            OSError: the folder cannot be written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate, which a model can produce, has no UTF-8 form: its escape is shown.
        content = self.html().encode("utf-8", errors="backslashreplace")
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # noqa: PTH101  mkstemp makes it readable by its owner only
            os.replace(temporary, path)  # noqa: PTH105
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)  # noqa: PTH108
            raise
        return path


def _escaped(text: str) -> str:
    return html.escape(text.replace("\0", "\ufffd"))


def _cell(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{_escaped(str(value))}</td>"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f'<td class="number">{shown}</td>'


def _line_chart(series: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "Report.curve: expected matplotlib, which is not installed. Run: pip install 'ftlib[plots]'"
        ) from error
    # A figure of its own, without pyplot: the caller's backend and open figures stay as they are.
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, points), colour, style in zip(series.items(), cycle(_COLOURS), cycle(_STYLES), strict=False):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, style, color=colour, label=name, marker="o" if len(points) <= _MARKED else "", ms=4)
    # Names are text: a dollar sign must not start a formula.
    axes.set_xlabel(xlabel, parse_math=False)
    axes.set_ylabel(ylabel, parse_math=False)
    axes.grid(alpha=0.3)
    for entry in axes.legend(frameon=False).get_texts():
        entry.set_parse_math(False)
    return figure


def _svg(figure: Figure, *, salt: str) -> str:
    """The figure as an `<svg>` element whose ids follow from `salt`, so that two on a page differ."""
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub(
        r'<g id="[^"]*">', "<g>", text
    )  # groups are numbered alike in every figure; nothing refers to them
    return text[text.index("<svg") :].strip()
