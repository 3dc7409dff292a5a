"""Which process runs when. Light on purpose: it imports neither torch nor either side.

    1. refuse a busy machine
    2. one process prepares rows and adapters, and measures the machine
    3. a short float32 run of both sides, for the losses
    4. pairs: every side in turn, a fresh process each; then the evaluator scores what they saved
    5. a pair whose times stand apart is run again
    6. the result as JSON, rewritten after every run, and as Markdown

The last lines of a failing process's log are shown; the whole log stays beside the result.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.jobs import Evaluate, Evaluation, Prepare, Prepared, Train, adapter_folder
from benchmarks.machine import BUSY_PROCESS, busiest_other, reasons_to_wait
from benchmarks.options import Options
from benchmarks.records import Result, Run
from benchmarks.summary import pair_apart, step_seconds, summarise
from benchmarks.table import markdown
from benchmarks.tasks import TASKS, Offer

__all__ = ["ROOT", "BusyError", "ChildError", "run"]

ROOT = Path(__file__).resolve().parent.parent
PARITY_STEPS = 3
REPEATS = 2  # pairs that are run again, at most
# The same for both sides: offline, no telemetry, nothing that differs from run to run.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


class BusyError(RuntimeError):
    """Something else uses the machine."""


class ChildError(RuntimeError):
    """A child process failed; the message ends with the end of its log."""


@dataclass(frozen=True)
class _Variant:
    """One column of the tables: a side in an environment."""

    label: str
    side: str
    environment: dict[str, str]


def run(options: Options) -> Result:
    """The whole benchmark.

    Raises:
        BusyError: the machine is not quiet.
        ChildError: a run failed.
    """
    if not options.force and (reasons := reasons_to_wait()):
        raise BusyError("; ".join(reasons))
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        return _Driver(options, Path(folder)).run()


class _Driver:
    def __init__(self, options: Options, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.stem = f"{datetime.now().astimezone():%Y-%m-%d}-{options.task}"
        self.started = time.monotonic()
        self.result: Result

    def run(self) -> Result:
        options = self.options
        self._say(f"preparing rows and adapters for {options.task}, measuring the machine")
        prepared: Prepared = self._child("prepare", self._prepare_job(), Prepared, {})
        self.result = self._empty(prepared)
        variants = self._variants()
        self._parity()
        for pair in range(options.pairs):
            self._pair(pair, variants)
        for _ in range(REPEATS):
            apart = pair_apart(self.result.runs, options.dropped)
            if apart is None:
                break
            self._say(f"pair {apart + 1} stands apart: running it again")
            self._set_aside(apart)
            self._pair(apart, variants)
        self._store(complete=True)
        return self.result

    # -- the runs ------------------------------------------------------------------------------

    def _variants(self) -> list[_Variant]:
        options = self.options
        theirs = (*self._offer.default(options.baseline), *options.tuned)
        variants = [_Variant(side, side, {}) for side in (*theirs, *self._offer.ours)]
        if options.allocator:
            variants += [
                _Variant(f"{side}+allocator", side, options.allocator) for side in self._default_sides
            ]
        return variants

    @property
    def _offer(self) -> Offer:
        return TASKS[self.options.task]

    @property
    def _default_sides(self) -> tuple[str, ...]:
        return (*self._offer.default(self.options.baseline), *self._offer.ours)

    @property
    def _all_steps(self) -> int:
        return self.options.steps * self.options.epochs

    def _pair(self, pair: int, variants: Sequence[_Variant]) -> None:
        """Every variant once, then the evaluation of all that has none."""
        for variant in variants:
            trained = self._train(variant, pair, self._all_steps, "default")
            trained = dataclasses.replace(trained, epochs=self.options.epochs)
            self._add("runs", trained)
            peak = trained.peak_bytes / 2**30
            self._say(
                f"pair {pair + 1} of {self.options.pairs}, {variant.label}: "
                f"{step_seconds(trained, self.options.dropped):.3f} s a step, {peak:.2f} GiB, "
                f"loss {trained.steps[0].loss:.4f} -> {trained.steps[-1].loss:.4f}"
            )
        self._evaluate()

    def _parity(self) -> None:
        """All sides in float32: the first steps of the timed runs, with their schedule."""
        steps = min(PARITY_STEPS, self.options.steps)
        for side in self._default_sides:
            trained = self._train(_Variant(side, side, {}), 0, steps, "float32")
            self._add("parity_runs", trained)
            losses = ", ".join(f"{step.loss:.7f}" for step in trained.steps)
            self._say(f"float32, {side}: losses {losses}")

    def _train(self, variant: _Variant, pair: int, steps: int, precision: str) -> Run:
        others, name = busiest_other(0.3)
        if others > BUSY_PROCESS:
            self._say(f"careful: {name} uses {others:.0%} of a core")
        job = Train(
            task=self.options.task,
            side=variant.side,
            model=self.options.model,
            device=self.options.device,
            precision=precision,
            folder=str(self.folder),
            adapter=str(adapter_folder(self.folder, pair)),
            output=str(self._trained(variant.label, pair, precision)),
            steps=self._all_steps,
            stop_after=steps,
            batch_size=self.options.batch_size,
            learning_rate=self.options.learning_rate,
            seed=self.options.seed + pair,
        )
        python = sys.executable if variant.side in self._offer.ours else self.options.baseline_python
        trained: Run = self._child("train", job, Run, variant.environment, python)
        return dataclasses.replace(
            trained, label=variant.label, pair=pair, environment=variant.environment, others_cpu=others
        )

    def _trained(self, label: str, pair: int, precision: str) -> Path:
        return self.folder / f"trained-{label}-{pair}-{precision}"

    def _evaluate(self) -> None:
        """Put the neutral evaluator's numbers into the records of the runs that lack them."""
        runs = [run for run in (*self.result.parity_runs, *self.result.runs) if run.eval_loss is None]
        trained = {
            f"{run.label}, {run.precision}": self._trained(run.label, run.pair, run.precision) for run in runs
        }
        initial = (str(adapter_folder(self.folder, run.pair)) for run in runs)
        job = Evaluate(
            task=self.options.task,
            model=self.options.model,
            folder=str(self.folder),
            adapters={name: str(folder) for name, folder in trained.items()},
            initial=dict(zip(trained, initial, strict=True)),
        )
        answer: Evaluation = self._child("evaluate", job, Evaluation, {})

        def scored(run: Run) -> Run:
            if run.eval_loss is not None:
                return run
            name = f"{run.label}, {run.precision}"
            return dataclasses.replace(
                run,
                eval_loss=answer.losses[name],
                eval_accuracy=answer.accuracies.get(name),
                adapter_delta=answer.deltas[name],
            )

        self._set("parity_runs", [scored(run) for run in self.result.parity_runs])
        self._set("runs", [scored(run) for run in self.result.runs])
        for name, folder in trained.items():
            shutil.rmtree(folder)
            loss, delta = answer.losses[name], answer.deltas[name]
            self._say(f"{name}: evaluation loss {loss:.5f}, adapter moved by {delta:.4f}")

    def _set_aside(self, pair: int) -> None:
        self._set(
            "runs",
            [
                dataclasses.replace(run, disturbed=True) if run.pair == pair else run
                for run in self.result.runs
            ],
        )

    # -- processes -----------------------------------------------------------------------------

    def _prepare_job(self) -> Prepare:
        options = self.options
        return Prepare(
            task=options.task,
            model=options.model,
            data=options.data,
            folder=str(self.folder),
            steps=options.steps,
            epochs=options.epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            held_out=options.held_out,
            pairs=options.pairs,
            seed=options.seed,
            matmul_size=options.matmul_size,
            copy_bytes=options.copy_bytes,
        )

    def _child(
        self,
        kind: str,
        job: Any,
        answer: type[Any],
        environment: dict[str, str],
        python: str = sys.executable,
    ) -> Any:
        """Do a job in a fresh process and read its answer."""
        job_file, answer_file = self.folder / "job.json", self.folder / "answer.json"
        answer_file.unlink(missing_ok=True)
        records.write(job_file, job)
        log = self.options.out / f"{self.stem}.log"
        with log.open("w", encoding="utf-8") as stream:
            done = subprocess.run(
                [python, "-m", "benchmarks.child", kind, str(job_file), str(answer_file)],
                cwd=ROOT,
                env={**os.environ, **self._environment(), **environment},
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise ChildError(f"{kind} ended with status {done.returncode}; the log is {log}:\n{tail}")
        log.unlink()
        return records.read(answer_file, answer)

    def _environment(self) -> dict[str, str]:
        return {**ENVIRONMENT, "HF_DATASETS_CACHE": str(self.folder / "cache")}

    # -- the result ----------------------------------------------------------------------------

    def _empty(self, prepared: Prepared) -> Result:
        return Result(
            task=self.options.task,
            baseline=self.options.baseline,
            date=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %z}",
            commit=_commit(),
            complete=False,
            command=sys.argv[1:],
            dropped_steps=self.options.dropped,
            environment=ENVIRONMENT | _inherited(),
            machine=prepared.machine,
            workload=prepared.workload,
        )

    def _add(self, place: str, trained: Run) -> None:
        self._set(place, [*getattr(self.result, place), trained])

    def _set(self, place: str, runs: list[Run]) -> None:
        changes: dict[str, Any] = {place: runs}
        self.result = dataclasses.replace(self.result, **changes)
        self._store(complete=False)

    def _store(self, *, complete: bool) -> None:
        result = dataclasses.replace(self.result, complete=complete)
        summary = summarise(
            result.runs,
            result.parity_runs,
            result.machine,
            result.workload,
            baseline=self._default_sides[0],
            dropped=result.dropped_steps,
        )
        self.result = dataclasses.replace(result, summary=summary)
        records.write(self.options.out / f"{self.stem}.json", self.result)
        (self.options.out / f"{self.stem}.md").write_text(markdown(self.result), encoding="utf-8")

    def _say(self, line: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        print(f"[{minutes:02d}:{seconds:02d}] {line}", flush=True)


def _inherited() -> dict[str, str]:
    """Variables of the caller that decide speed, and that both sides inherit."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("OMP_", "MKL_", "GOMP_", "KMP_", "MALLOC_", "LD_PRELOAD"))
    }


def _commit() -> str:
    """The commit, with a mark where the measured code differs from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = " with changes" if git("status", "--porcelain", "--", "ftlib", "benchmarks/*.py") else ""
    return f"{git('rev-parse', 'HEAD') or 'unknown'}{changed}"
