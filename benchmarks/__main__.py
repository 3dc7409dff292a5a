"""`python -m benchmarks TASK`: see `--help`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import environments
from benchmarks.driver import ROOT, BusyError, ChildError, run
from benchmarks.options import Options
from benchmarks.tasks import BASELINES, TASKS

__all__ = ["main"]

# glibc keeps what it has instead of giving it back and asking again
KEEP_HEAP = "MALLOC_MMAP_MAX_=0,MALLOC_TRIM_THRESHOLD_=68719476736"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 where every check held, 1 where one failed, 2 where it could not run."""
    parsed = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="benchmark-model-") as folder:
        try:
            result = run(_options(parsed, Path(folder)))
        except BusyError as error:
            print(f"not started, timings would mean nothing: {error}. Wait, or use --force.", file=sys.stderr)
            return 2
        except (ChildError, subprocess.CalledProcessError) as error:
            print(error, file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; the result holds the runs that ended", file=sys.stderr)
            return 130
    assert result.summary is not None
    for each in result.summary.comparisons:
        print(
            f"{each.label} against {each.baseline}: {each.speed:.2f} times as fast "
            f"({each.speed_range[0]:.2f} - {each.speed_range[1]:.2f}), {each.memory:.2f} of the memory"
        )
    for problem in result.summary.problems:
        print(f"failed: {problem}")
    return 1 if result.summary.problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Paired measurements of ftlib against another library."
    )
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("--baseline", choices=BASELINES, default="trl")
    parser.add_argument(
        "--baseline-python",
        type=_interpreter,
        metavar="PATH",
        help="interpreter that has the baseline (default: this one, or for a task whose baseline needs "
        "another version, that of an environment made on first use in the user's cache)",
    )
    parser.add_argument("--pairs", type=_positive, help="runs of each side (default: 3)")
    parser.add_argument("--model", type=_folder, help="a model's folder (default: the demo's model)")
    parser.add_argument(
        "--data", type=_file, help="a file of records (default: docstrings of the standard library)"
    )
    parser.add_argument("--steps", type=_steps, help="optimiser steps of one epoch (default: 12)")
    parser.add_argument("--epochs", type=_positive, default=1, help="passes over the rows (default: 1)")
    parser.add_argument("--out", type=Path, help="where the result goes (default: benchmarks/results)")
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument(
        "--tuned",
        nargs="*",
        metavar="SIDE",
        help="also run the baseline's best settings: those named, or all that the task has",
    )
    parser.add_argument(
        "--allocator",
        nargs="?",
        const=KEEP_HEAP,
        default="",
        metavar="NAME=VALUE,...",
        help=f"extra runs of both sides with these variables set (without a value: {KEEP_HEAP})",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model, 3 steps, one pair: checks, no timings"
    )
    parser.add_argument("--force", action="store_true", help="start although the machine is busy")
    return parser


def _options(parsed: argparse.Namespace, folder: Path) -> Options:
    smoke = parsed.smoke
    return Options(
        task=parsed.task,
        baseline=parsed.baseline,
        pairs=parsed.pairs or (1 if smoke else 3),
        model=parsed.model or str(_model(folder, smoke=smoke)),
        data=parsed.data or "",
        steps=parsed.steps or (3 if smoke else 12),
        epochs=parsed.epochs,
        learning_rate=TASKS[parsed.task].learning_rate,
        out=(parsed.out or ROOT / ("build/smoke" if smoke else "benchmarks/results")).resolve(),
        device=parsed.device,
        tuned=_tuned(parsed),
        allocator=dict(setting.split("=", 1) for setting in parsed.allocator.split(",") if setting),
        force=parsed.force or smoke,
        baseline_python=parsed.baseline_python or _baseline_python(parsed.task, parsed.baseline),
        **({"held_out": 8, "matmul_size": 128, "copy_bytes": 2**20} if smoke else {}),
    )


def _tuned(parsed: argparse.Namespace) -> tuple[str, ...]:
    best = TASKS[parsed.task].best(parsed.baseline)
    named: list[str] = parsed.tuned or []
    if unknown := sorted(set(named) - set(best)):
        offered = ", ".join(best) or "no such side"
        raise SystemExit(f"--tuned: {parsed.task} has {offered}, not {unknown[0]!r}")
    return best if parsed.tuned == [] else tuple(named)


def _model(folder: Path, *, smoke: bool) -> Path:
    if smoke:
        from benchmarks.smoke import write_tiny_model

        return write_tiny_model(folder / "tiny-llama")
    import ftlib as ft

    return Path(ft.demo_model())


def _baseline_python(task: str, baseline: str) -> str:
    """Of the environment that the task names for the baseline, else this one."""
    name = TASKS[task].environments.get(baseline)
    return sys.executable if name is None else str(environments.make(name))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {text}")
    return number


def _steps(text: str) -> int:
    number = int(text)
    if number <= Options.dropped:
        raise argparse.ArgumentTypeError(
            f"expected more than the {Options.dropped} that are dropped, got {text}"
        )
    return number


def _folder(text: str) -> str:
    if not (Path(text) / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"expected a folder with a config.json, got {text}")
    return str(Path(text).resolve())


def _interpreter(text: str) -> str:
    if not os.access(text, os.X_OK) or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"expected an interpreter, got {text}")
    return str(Path(text).absolute())  # not resolved: a link is what makes it that of an environment


def _file(text: str) -> str:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"expected a file, got {text}")
    return str(Path(text).resolve())


if __name__ == "__main__":
    sys.exit(main())
