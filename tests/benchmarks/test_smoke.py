"""The whole benchmark on a tiny model: its file, the parity of both sides, and proof that they trained."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import records
from benchmarks.records import Result, Run
from benchmarks.summary import CLOSE, PARITY

ROOT = Path(__file__).resolve().parents[2]
STEPS, ROWS = 3, 8

pytestmark = [pytest.mark.slow, pytest.mark.oracle]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "benchmarks", "sft", "--smoke", "--data", "faq.jsonl", "--out", str(out)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # enough for a tiny model, and kind to the neighbours
    return out, subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def result(finished) -> Result:
    """Read back strictly: a field that is missing, unknown or of another type fails here."""
    out, process = finished
    assert process.returncode == 0, process.stdout + process.stderr
    (file,) = out.glob("*-sft.json")
    read: Result = records.read(file)
    return read


def every_run(result: Result) -> list[Run]:
    return [*result.runs, *result.parity_runs]


def test_both_sides_ran_timed_and_in_float32(result):
    assert result.complete
    assert [run.side for run in result.runs] == ["trl", "ftlib"]
    assert [(run.side, run.weights_dtype) for run in result.parity_runs] == [
        ("trl", "torch.float32"),
        ("ftlib", "torch.float32"),
    ]


def test_both_sides_saw_the_same_rows_and_labels_in_every_step(result):
    work = [[(s.rows_sha256, s.tokens, s.trained_tokens) for s in run.steps] for run in every_run(result)]
    assert all(steps == work[0] for steps in work)
    assert len(set(work[0])) == STEPS  # and other ones in each step
    assert result.workload.rows == STEPS * ROWS


def test_float32_losses_agree(result):
    trl, ftlib = result.parity_runs
    for ours, theirs in zip(ftlib.steps, trl.steps, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=PARITY)
    assert result.summary.parity <= PARITY


def test_float32_evaluation_losses_agree(result):
    """The neutral evaluator finds the same model behind both saved adapters."""
    trl, ftlib = result.parity_runs
    assert ftlib.eval_loss == pytest.approx(trl.eval_loss, rel=PARITY)


def test_losses_in_the_default_precision_stay_close_to_float32(result):
    timed, exact = result.runs[1], result.parity_runs[0]
    assert (timed.side, timed.pair, exact.pair) == ("ftlib", 0, 0)
    for ours, reference in zip(timed.steps, exact.steps, strict=True):
        assert ours.loss == pytest.approx(reference.loss, abs=CLOSE)


def test_every_run_trained_its_adapter_and_nothing_else(result):
    for run in every_run(result):
        assert all(step.grad_norm > 0 for step in run.steps)
        assert run.adapter_delta > 0
        before, after = run.base_sha256
        assert before == after
    assert result.summary.problems == []


def test_times_memory_and_rates_are_there(result):
    for run in every_run(result):
        assert all(step.seconds >= step.inside_seconds > 0 for step in run.steps)
        assert run.peak_bytes > 2**27  # an interpreter with torch loaded
    assert result.machine.matmul_flops.keys() == {"bfloat16", "float32"}
    assert all(side.efficiency > 0 for side in result.summary.sides.values())


def test_a_page_of_markdown_stands_beside_the_result(finished, result):
    out, _ = finished
    (page,) = out.glob("*-sft.md")
    text = page.read_text(encoding="utf-8")
    assert "(unfinished)" not in text
    assert f"| {result.parity_runs[0].steps[0].loss:.6f} |" in text
    assert not list(out.glob("*.log"))
