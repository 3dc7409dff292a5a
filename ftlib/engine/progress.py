"""Showing how training goes: an updating line, plain lines, or a table in a notebook.

`ProgressCallback` picks the surface and feeds it; each surface is a class of two methods. Numbers come
from the ``logs`` of on_log and from the trainer state, never from the device.
"""

# ruff: noqa: ARG002  both protocols hand every method more than each needs

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TextIO, final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftlib.engine.progress_html import progress_html
from ftlib.engine.progress_text import duration, metrics_text
from ftlib.errors import ConfigError

__all__ = ["Progress", "ProgressCallback", "Surface", "SurfaceName"]

SurfaceName = Literal["auto", "terminal", "plain", "notebook"]
REFRESH = 0.1  # seconds between updates of a line that nothing was logged for


@dataclass
class Progress:
    """Where a run stands.

    Args:
        step: optimiser steps completed.
        total: steps planned; 0 when unknown.
        left: seconds to go, None when unknown.
        rows: every entry logged so far, in order.
    """

    step: int = 0
    total: int = 0
    left: float | None = None
    rows: list[Mapping[str, Any]] = field(default_factory=list)


class Surface(Protocol):
    """A place where progress is shown."""

    def show(self, progress: Progress, *, logged: bool) -> None:
        """Show it; `logged` when the last of its rows is new."""

    def close(self) -> None:
        """Leave the place tidy. May be called twice."""


@final
class ProgressCallback(TrainerCallback):
    """Progress of a run, on the first process only.

    Args:
        disable: show nothing.
        surface: where; "auto" takes a notebook's output, else a terminal's line, else plain lines.
        stream: text stream of the line or lines; None means standard error as it is when training begins.
        clock: seconds, for the time left.

    Raises:
        ConfigError: an unknown surface.
    """

    def __init__(
        self,
        *,
        disable: bool = False,
        surface: SurfaceName = "auto",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        names = ("auto", "terminal", "plain", "notebook")
        if surface not in names:
            raise ConfigError(f"surface: expected one of {names}, got {surface!r}. Use 'auto'.")
        self.disable = disable
        self.surface = surface
        self._stream = stream
        self._clock = clock
        self._shown: Surface | None = None
        self._progress = Progress()
        self._first_step = 0
        self._began = self._updated = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the surface; a resumed run counts its time from where it resumed."""
        self.close()
        if self.disable or not state.is_world_process_zero:
            return
        self._shown = _open(self.surface, self._stream or sys.stderr)
        self._progress = Progress(state.global_step, state.max_steps)
        self._first_step = state.global_step
        self._began = self._updated = self._clock()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move on, at most ten times a second."""
        if self._shown is not None and self._clock() - self._updated >= REFRESH:
            self._show(self._shown, state, logged=False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show an entry of the log."""
        if self._shown is not None and logs:
            self._progress.rows.append({"step": state.global_step, **logs})
            self._show(self._shown, state, logged=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show where it ended and close the surface."""
        if self._shown is not None:
            self._show(self._shown, state, logged=False)
        self.close()

    def close(self) -> None:
        """Leave the terminal tidy. For loops that end without on_train_end, such as after an error."""
        if self._shown is not None:
            self._shown.close()
            self._shown = None

    def _show(self, surface: Surface, state: TrainerState, *, logged: bool) -> None:
        self._updated = self._clock()
        done, to_go = state.global_step - self._first_step, state.max_steps - state.global_step
        self._progress.step, self._progress.total = state.global_step, state.max_steps
        self._progress.left = (
            (self._updated - self._began) / done * to_go if done > 0 and to_go >= 0 else None
        )
        surface.show(self._progress, logged=logged)


@final
class PlainLines:
    """One line per log entry: no colour, nothing overwritten. For files and continuous integration."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, progress: Progress, *, logged: bool) -> None:
        """Write the newest entry."""
        if logged:
            print(_line(progress), file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing is open."""


@final
class UpdatingLine:
    """One terminal line, rewritten in place and cut to the terminal's width."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._written = 0

    def show(self, progress: Progress, *, logged: bool) -> None:
        """Rewrite the line."""
        text = _line(progress)[: shutil.get_terminal_size().columns - 1]
        print("\r" + text.ljust(self._written), end="", file=self._stream, flush=True)
        self._written = len(text)

    def close(self) -> None:
        """Move below the line."""
        if self._written:
            print(file=self._stream, flush=True)
        self._written = 0


@final
class RichLine:
    """The same line with a bar and colour, drawn by rich.

    Drawn once per call rather than by `rich.progress.Progress`, which starts a thread, hides the cursor
    and replaces ``sys.stdout`` until it is stopped.
    """

    BAR = 20  # columns

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream)
        self._open = False

    def show(self, progress: Progress, *, logged: bool) -> None:
        """Rewrite the line."""
        from rich.control import Control
        from rich.progress_bar import ProgressBar
        from rich.segment import ControlType
        from rich.table import Table
        from rich.text import Text

        steps, numbers = Text(_steps(progress), "bold"), Text(_numbers(progress))
        numbers.truncate(max(1, self._console.width - len(steps) - self.BAR - 3), overflow="ellipsis")
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=progress.total or None, completed=progress.step, width=self.BAR)
        line.add_row(steps, bar, numbers)
        self._console.control(Control((ControlType.CURSOR_MOVE_TO_COLUMN, 0), (ControlType.ERASE_IN_LINE, 2)))
        with self._console.capture() as captured:
            self._console.print(line, end="")
        self._console.file.write(captured.get().rstrip("\n"))
        self._console.file.flush()
        self._open = True

    def close(self) -> None:
        """Move below the line."""
        if self._open:
            self._console.print()
        self._open = False


@final
class NotebookTable:
    """One HTML output, replaced in place through its display id."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, progress: Progress, *, logged: bool) -> None:
        """Replace the output."""
        from IPython.display import HTML, display

        shown = HTML(progress_html(progress.step, progress.total, progress.left, progress.rows))
        if self._handle is None:
            self._handle = display(shown, display_id=True)
        else:
            self._handle.update(shown)

    def close(self) -> None:
        """The output stays as it is."""


def _open(surface: SurfaceName, stream: TextIO) -> Surface:
    if surface == "notebook" or (surface == "auto" and _in_notebook()):
        return NotebookTable()
    interactive = stream.isatty() and os.environ.get("TERM") != "dumb"
    if surface == "plain" or (surface == "auto" and not interactive):
        return PlainLines(stream)
    try:
        return RichLine(stream)
    except ImportError:
        return UpdatingLine(stream)


def _in_notebook() -> bool:
    """Whether a kernel displays our output. IPython is asked only if it is already running."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def _steps(progress: Progress) -> str:
    return f"step {progress.step}/{progress.total}" if progress.total else f"step {progress.step}"


def _numbers(progress: Progress) -> str:
    parts = [metrics_text(progress.rows[-1])] if progress.rows else []
    if progress.left is not None:
        parts.append(f"left {duration(progress.left)}")
    return "  ".join(part for part in parts if part)


def _line(progress: Progress) -> str:
    return f"{_steps(progress)}  {_numbers(progress)}".rstrip()
