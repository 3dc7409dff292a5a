"""Whole benchmarks on a tiny model: their files, the parity of both sides, and proof that they trained."""

from __future__ import annotations

import functools
import json
import math
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
TASKS = ("sft", "reward", "dpo")
EPOCHS = {"sft": 1, "reward": 1, "dpo": 2}

pytestmark = [pytest.mark.slow, pytest.mark.oracle]


def write_pairs(file: Path) -> Path:
    """Questions with their answers, and as the worse ones the answers to other questions."""
    rows = [json.loads(line) for line in (ROOT / "faq.jsonl").read_text(encoding="utf-8").splitlines()]
    others = rows[len(rows) // 2 :] + rows[: len(rows) // 2]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in zip(rows, others, strict=True)
    ]
    file.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def finish(tmp_path_factory):
    """Task -> folder and process of its benchmark, which runs once."""

    @functools.cache
    def run(task: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
        out = tmp_path_factory.mktemp(task)
        data = "faq.jsonl" if task == "sft" else str(write_pairs(out / "pairs.jsonl"))
        options = ["--smoke", "--data", data, "--epochs", str(EPOCHS[task]), "--out", str(out)]
        command = [sys.executable, "-m", "benchmarks", task, *options]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}  # enough for a tiny model, and kind to the neighbours
        return out, subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)

    return run


@pytest.fixture(params=[pytest.param(task, marks=pytest.mark.long) for task in TASKS])
def task(request) -> str:
    return request.param


@pytest.fixture
def finished(finish, task):
    return finish(task)


@pytest.fixture
def result(finished, task) -> Result:
    """Read back strictly: a field that is missing, unknown or of another type fails here."""
    out, process = finished
    assert process.returncode == 0, process.stdout + process.stderr
    (file,) = out.glob(f"*-{task}.json")
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


def test_both_sides_saw_the_same_rows_and_labels_in_every_step(result, task):
    work = [[(s.rows_sha256, s.tokens, s.trained_tokens) for s in run.steps] for run in every_run(result)]
    epoch = work[0][:STEPS]
    assert len(set(epoch)) == STEPS  # other ones in each step
    for steps, run in zip(work, every_run(result), strict=True):
        assert steps == epoch * (EPOCHS[task] if run.precision == "default" else 1)
    assert result.workload.rows == STEPS * ROWS
    assert result.workload.left_out == result.workload.differing == 0


def test_float32_losses_agree(result):
    trl, ftlib = result.parity_runs
    for ours, theirs in zip(ftlib.steps, trl.steps, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=PARITY)
    assert result.summary.parity <= PARITY


def test_float32_evaluations_agree(result, task):
    """The neutral evaluator finds the same model behind both saved adapters."""
    trl, ftlib = result.parity_runs
    assert ftlib.eval_loss == pytest.approx(trl.eval_loss, rel=PARITY)
    assert ftlib.eval_accuracy == trl.eval_accuracy
    assert (trl.eval_accuracy is None) == (task == "sft")


def test_where_policy_and_reference_are_one_the_loss_is_log_2(result, task):
    assert result.workload.starts_at == (math.log(2) if task == "dpo" else None)
    if task == "dpo":
        for run in every_run(result):
            assert run.steps[0].loss == pytest.approx(math.log(2), rel=PARITY)


def test_epochs_are_summed_up_apart(finished, result, task):
    for side in result.summary.sides.values():
        assert len(side.epoch_seconds) == EPOCHS[task]
    out, _ = finished
    (page,) = out.glob("*.md")
    assert ("epoch 2" in page.read_text(encoding="utf-8")) == (EPOCHS[task] > 1)


def test_losses_in_the_default_precision_stay_close_to_float32(result):
    timed, exact = result.runs[1], result.parity_runs[0]
    assert (timed.side, timed.pair, exact.pair) == ("ftlib", 0, 0)
    for ours, reference in zip(timed.steps[:STEPS], exact.steps, strict=True):
        assert ours.loss == pytest.approx(reference.loss, abs=CLOSE)


def test_every_run_trained_its_adapter_and_nothing_else(result):
    for run in every_run(result):
        assert all(step.grad_norm > 0 for step in run.steps)
        assert run.adapter_delta > 0
        before, after = run.base_sha256
        assert before == after
    assert result.summary.problems == []


def test_a_reference_is_in_the_floor_of_the_first_epoch_alone(result, task):
    """Training costs two forwards and more, so without the reference's at least 2/3 is left."""
    flops = result.workload.floor_flops
    assert len(flops) == STEPS * EPOCHS[task]
    for first, later in zip(flops[:STEPS], flops[STEPS:], strict=task == "dpo"):
        assert 2 / 3 * first <= later < first


def test_times_memory_and_rates_are_there(result):
    for run in every_run(result):
        assert all(step.seconds >= step.inside_seconds > 0 for step in run.steps)
        assert run.peak_bytes > 2**27  # an interpreter with torch loaded
    assert result.machine.matmul_flops.keys() == {"bfloat16", "float32"}
    assert all(side.efficiency > 0 for side in result.summary.sides.values())


def test_a_page_of_markdown_stands_beside_the_result(finished, result, task):
    out, _ = finished
    (page,) = out.glob(f"*-{task}.md")
    text = page.read_text(encoding="utf-8")
    assert "(unfinished)" not in text
    assert f"| {result.parity_runs[0].steps[0].loss:.6f} |" in text
    assert not list(out.glob("*.log"))
