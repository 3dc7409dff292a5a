"""Progress as text, as a terminal line, and as HTML."""

from __future__ import annotations

import io
import math
import re
import sys
import threading
import types
from html.parser import HTMLParser

import pytest
from transformers import TrainerControl, TrainerState

from ftlib.engine import progress as progress_module
from ftlib.engine.progress import ProgressCallback
from ftlib.engine.progress_html import ROWS_SHOWN, curve_svg, progress_html
from ftlib.engine.progress_text import duration, metric_text, metrics_text
from ftlib.errors import ConfigError

LOGS = {
    "step": 5,
    "loss": 2.345678,
    "learning_rate": 5e-5,
    "grad_norm": 0.5,
    "tokens_per_second": 1234.5,
    "peak_memory_bytes": 512 * 2**20,
}
LINE = (
    "step 5/10  loss 2.346  learning_rate 5.00e-05  grad_norm 0.5  "
    "tokens/s 1,234  peak_memory 512 MiB  left 0:50"
)
SECONDS_PER_STEP = 10
EVIL = '<script>alert("x")</script>\r\x1b[2J\n'


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(
    callback: ProgressCallback, clock: list[float], *, steps=10, log_at=(5, 10), logs=LOGS, start=0, main=True
):
    """A loop of ten-second steps that logs at two of them."""
    state, control = TrainerState(), TrainerControl()
    state.max_steps, state.global_step, state.is_world_process_zero = steps, start, main
    callback.on_train_begin(None, state, control)
    for step in range(start + 1, steps + 1):
        state.global_step = step
        clock[0] += SECONDS_PER_STEP
        callback.on_step_end(None, state, control)
        if step in log_at:
            callback.on_log(None, state, control, logs=logs | {"step": step})
    callback.on_train_end(None, state, control)


def shown(stream: io.StringIO, **options) -> str:
    clock = [0.0]
    surface = options.pop("surface", "auto")
    disable = options.pop("disable", False)
    run(
        ProgressCallback(stream=stream, clock=lambda: clock[0], surface=surface, disable=disable),
        clock,
        **options,
    )
    return stream.getvalue()


# --- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("loss", 0.000012345, "1.234e-05"),
        ("loss", math.nan, "nan"),
        ("loss", math.inf, "inf"),
        ("loss", 2.0, "2"),
        ("tokens", 1234567, "1,234,567"),
        ("tokens_per_second", 12.3456, "12.35"),
        ("tokens_per_second", 123456.7, "123,457"),
        ("peak_memory_bytes", 3 * 2**30, "3.0 GiB"),
        ("peak_memory_bytes", 2**20, "1 MiB"),
        ("peak_memory_bytes", math.nan, "nan MiB"),
        ("adapter", "lora\r\n\x1b[31m", r"lora\r\n\x1b[31m"),
        ("flag", True, "True"),
    ],
)
def test_value_is_shown_with_its_unit(name, value, text):
    assert metric_text(name, value) == text


def test_step_is_not_repeated_among_the_metrics():
    assert metrics_text({"step": 1, "loss": 1.0}) == "loss 1"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.4, "0:59"), (59.5, "1:00"), (3599.6, "1:00:00"), (90061, "25:01:01")],
)
def test_duration_rounds_to_whole_seconds(seconds, text):
    assert duration(seconds) == text


# --- not a terminal --------------------------------------------------------------------------------


def test_file_gets_one_plain_line_per_log_step():
    """Five of ten steps took 50 s, so 50 s are left; then none are."""
    first, second = shown(io.StringIO()).splitlines()
    assert first == LINE
    assert second.startswith("step 10/10  ")
    assert second.endswith("left 0:00")


def test_file_gets_no_control_characters_whatever_is_logged():
    text = shown(io.StringIO(), logs={"note": EVIL, EVIL: 1.0})
    assert len(text.split("\n")) == 3
    assert all(char.isprintable() for char in text.replace("\n", ""))


def test_resumed_run_counts_time_from_where_it_resumed():
    """Resumed at 4 and logged at 5: one step took 10 s, five are to go."""
    assert shown(io.StringIO(), start=4, log_at=(5,)).rstrip().endswith("left 0:50")


def test_dumb_terminal_is_no_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert "\r" not in shown(Terminal())


@pytest.mark.parametrize("options", [{"disable": True}, {"main": False}])
@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_disabled_or_other_processes_show_nothing(options, stream):
    assert shown(stream(), **options) == ""


def test_unknown_surface_is_refused():
    with pytest.raises(ConfigError, match="'tui'"):
        ProgressCallback(surface="tui")


def test_default_stream_is_standard_error_of_the_moment(capsys):
    clock = [0.0]
    run(ProgressCallback(clock=lambda: clock[0], surface="plain"), clock)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[0] == LINE


# --- terminal --------------------------------------------------------------------------------------


@pytest.fixture
def without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)


def screen(text: str) -> list[str]:
    """What a terminal shows in the end, carriage returns and the erase sequence obeyed."""
    lines = []
    for line in text.split("\n"):
        cells: list[str] = []
        for part in line.replace("\x1b[1G", "\r").split("\r"):
            if part.startswith("\x1b[2K"):
                part, cells = part.removeprefix("\x1b[2K"), []
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


def test_line_is_rewritten_in_place(without_rich, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = shown(Terminal())
    assert text.count("\n") == 1
    assert text.count("\r") > 2
    assert screen(text) == [LINE.replace("5/10", "10/10").replace("0:50", "0:00"), ""]


def test_shorter_line_leaves_nothing_of_the_longer_one(without_rich, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    line = progress_module.UpdatingLine(stream)
    line.show(progress_module.Progress(1, 10, 1e6), logged=True)
    line.show(progress_module.Progress(2, 10), logged=True)
    assert screen(stream.getvalue()) == ["step 2/10"]


def test_line_is_cut_to_the_width_of_the_terminal(without_rich, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert all(len(part) <= 19 for part in shown(Terminal()).rstrip("\n").split("\r"))


def test_rich_draws_the_same_line_with_a_bar(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    text = shown(Terminal())
    assert text.count("\n") == 1
    [line, rest] = screen(strip_styles(text))
    assert rest == ""
    for part in ("step 10/10", "━━━━", "loss 2.346", "tokens/s 1,234", "left 0:00"):
        assert part in line


def test_rich_line_stays_on_one_line_of_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    text = shown(Terminal())
    assert text.count("\n") == 1
    [line, _] = screen(strip_styles(text))
    assert len(line) <= 40
    assert line.startswith("step 10/10 ━")  # what is cut is the end
    assert line.endswith("…")


def test_rich_starts_no_thread_and_leaves_the_cursor_and_the_streams_alone(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    stream, clock, streams, threads = Terminal(), [0.0], (sys.stdout, sys.stderr), threading.active_count()
    callback = ProgressCallback(stream=stream, clock=lambda: clock[0])
    state = TrainerState()
    state.max_steps = 10
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs=LOGS)
    assert (sys.stdout, sys.stderr) == streams
    assert threading.active_count() == threads
    assert "\x1b[?25l" not in stream.getvalue()  # hides the cursor
    callback.close()
    callback.close()
    assert stream.getvalue().count("\n") == 1


def strip_styles(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_steps_between_logs_move_the_line_at_most_ten_times_a_second(without_rich):
    stream, now = Terminal(), [0.0]
    callback = ProgressCallback(stream=stream, clock=lambda: now[0])
    state = TrainerState()
    state.max_steps = 100
    callback.on_train_begin(None, state, None)
    for step in range(1, 101):
        now[0], state.global_step = step / 64, step  # 64 steps a second, exact in binary
        callback.on_step_end(None, state, None)
    assert stream.getvalue().count("\r") == 100 // 7  # the seventh step is the first past 0.1 s


# --- notebook --------------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Tags seen, text of the table's cells, and whether every tag is closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.cells = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)
        self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def parsed(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def test_table_shows_every_metric_of_any_entry():
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "eval_loss": 2.25, "eval_accuracy": 0.5}]
    cells = parsed(progress_html(2, 4, 8.0, rows)).cells
    assert cells == ["step", "loss", "eval_loss", "eval_accuracy", "1", "2.5", "", "", "2", "", "2.25", "0.5"]


def test_everything_logged_is_escaped():
    html = progress_html(1, 2, None, [{"step": 1, "loss": 1.0, "note": EVIL, EVIL: EVIL}])
    checker = parsed(html)
    assert "script" not in checker.tags
    assert r'<script>alert("x")</script>\r\x1b[2J\n' in checker.cells


def test_curve_draws_training_and_evaluation_in_different_dashes():
    rows = [{"step": step, "loss": 3.0 - step} for step in (1, 2)] + [{"step": 2, "eval_loss": 1.5}]
    svg = curve_svg(rows)
    assert svg.count("<polyline") == 2
    assert svg.count("stroke-dasharray") == 1
    assert parsed(svg).tags.count("svg") == 1
    for label in (">2<", ">1<", "step 2", "(nats)"):
        assert label in svg


def test_higher_loss_is_drawn_higher():
    """SVG's y grows downwards; the picture's corners are (44, 44) and (436, 116)."""
    svg = curve_svg([{"step": 0, "loss": 2.0}, {"step": 10, "loss": 1.0}])
    assert 'points="44.0,44.0 436.0,116.0"' in svg


@pytest.mark.parametrize("bad", [math.nan, math.inf, "x", None])
def test_values_that_cannot_be_drawn_are_left_out(bad):
    rows = [{"step": step, "loss": 1.0} for step in (1, 2)]
    assert curve_svg([*rows, {"step": 3, "loss": bad}]) == curve_svg(rows)


def test_one_point_or_none_draws_no_curve():
    assert curve_svg([]) == curve_svg([{"step": 1, "loss": 1.0}]) == ""
    assert parsed(progress_html(0, 0, None, [])).tags == ["div", "p", "b"]


def test_constant_loss_is_drawn():
    assert curve_svg([{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}]).count("<polyline") == 1


def test_long_run_keeps_the_output_small_and_shows_the_newest():
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 10_001)]
    html = progress_html(10_000, 10_000, 0.0, rows)
    assert len(html) < 30_000
    checker = parsed(html)
    assert checker.tags.count("tr") == ROWS_SHOWN + 1
    assert checker.cells[-2] == "10,000"
    assert f"the last {ROWS_SHOWN} of 10,000 entries" in html


class FakeHandle:
    def __init__(self, shown):
        self.shown = [shown]

    def update(self, shown):
        self.shown.append(shown)


@pytest.fixture
def notebook(monkeypatch):
    """IPython as in a kernel; returns the handles that were made."""
    import IPython
    import IPython.display

    handles = []

    def display(shown, *, display_id):
        assert display_id is True
        handles.append(FakeHandle(shown))
        return handles[-1]

    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    monkeypatch.setattr(IPython.display, "display", display)
    return handles


def test_notebook_updates_one_output_in_place(notebook):
    assert shown(Terminal()) == ""
    [handle] = notebook
    assert len(handle.shown) > 2
    last = handle.shown[-1].data
    assert "step 10 of 10, 0:00 left" in last
    assert parsed(last).cells[:3] == ["step", "loss", "learning_rate"]


def test_second_training_gets_its_own_output(notebook):
    clock = [0.0]
    callback = ProgressCallback(clock=lambda: clock[0])
    for _ in range(2):
        run(callback, clock)
    assert len(notebook) == 2
    assert (
        len(parsed(notebook[1].shown[-1].data).cells) == 3 * 6
    )  # a heading and two entries, none of the first


def test_ipython_without_a_kernel_is_a_terminal(monkeypatch):
    import IPython

    monkeypatch.setattr(IPython, "get_ipython", lambda: types.SimpleNamespace(config={}))
    assert shown(io.StringIO()).startswith("step 5/10")
