"""The PPO benchmark on a tiny model: equal work of sides that draw their own completions.

TRL's side needs an environment with TRL 1.12, which is never made here: it is used where
`python -m benchmarks ppo --smoke` has made it, or where FTLIB_BENCHMARK_PYTHON names its interpreter.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import environments, records
from benchmarks.drawn import EXACT_UPDATES, problems_of_drawing, scores_apart
from benchmarks.records import Drawing, Result, Run, Step
from benchmarks.summary import summarise
from benchmarks.table import markdown
from benchmarks.tasks import TASKS, ppo
from tests.benchmarks.test_summary import MACHINE, WORKLOAD, result, run

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = TASKS["ppo"].environments["trl"]
STEPS, ROWS = 3, 8
OURS = ["ftlib", "ftlib-adapter"]

NEW, UPDATES = 5, 4
DRAWING = Drawing(NEW, UPDATES, 0.7, [10.0] * 3, [20.0] * 3)
GOOD = {"optimizer_steps": UPDATES, "score_error": 0.0, "score": 1.0, "kl": 0.0}
EXACT = GOOD | {"optimizer_steps": EXACT_UPDATES, "ratio_error": 0.0}


# -- checks ----------------------------------------------------------------------------------------


def drew(label: str = "ftlib", precision: str = "default", tokens: int = NEW, **measures: float) -> Run:
    """One prompt a step; every step alike."""
    known = EXACT if precision == "float32" else GOOD
    each = Step(1.0, 1.0, 2.0, 1.0, 9, tokens, "a", {**known, **measures})
    return dataclasses.replace(run(label, 0, 1.0), precision=precision, steps=[each] * 3)


@pytest.mark.parametrize("precision", ["default", "float32"])
def test_equal_work_has_no_problems(precision):
    assert problems_of_drawing([drew("trl", precision), drew("ftlib", precision)], DRAWING, 1) == []


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (drew(tokens=NEW - 1), "5 tokens drawn"),
        (drew(optimizer_steps=UPDATES - 1), "4 optimiser steps"),
        (drew(score_error=0.1), "0.1 off those of plain transformers"),
        (drew(precision="float32", ratio_error=0.1), "at ratio 1, got 0.1"),
        (drew(precision="float32", kl=0.1), "start at the reference, got a KL of 0.1"),
        (drew(precision="float32", optimizer_steps=UPDATES), "1 optimiser steps"),
    ],
)
def test_other_work_is_a_problem(wrong, told):
    (problem,) = problems_of_drawing([drew("trl"), wrong], DRAWING, 1)
    assert told in problem


def test_scores_outside_the_seeds_of_the_baseline_are_noted_from_three_seeds_on():
    assert scores_apart({"trl": [1.0, 2.0, 3.0], "ftlib": [2.5, 3.5, 4.0]}, "trl") == []
    assert scores_apart({"trl": [1.0, 2.0], "ftlib": [9.0]}, "trl") == []
    (note,) = scores_apart({"trl": [1.0, 2.0, 3.0], "ftlib": [3.1, 3.5, 4.0]}, "trl")
    assert "ftlib: scores of 3.100 - 4.000" in note


WITH_DRAWING = dataclasses.replace(WORKLOAD, drawing=DRAWING)


def test_losses_are_not_compared_where_each_side_draws_its_own_data():
    """Off by 7 in every step, timed and in float32."""
    far = [dataclasses.replace(each, loss=9.0) for each in drew().steps]
    exact = [drew("trl", "float32"), drew("ftlib", "float32")]
    timed = [drew("trl"), dataclasses.replace(drew("ftlib"), steps=far)]
    made = summarise(timed, exact, MACHINE, WITH_DRAWING, baseline="trl", dropped=1)
    assert (made.problems, made.parity, made.sides["ftlib"].rounding) == ([], None, None)
    assert made.comparisons[0].loss_difference is None
    assert made.sides["ftlib"].scores == [1.0]
    assert made.sides["ftlib"].measures["optimizer_steps"] == UPDATES
    page = markdown(dataclasses.replace(result(), workload=WITH_DRAWING, runs=timed, summary=made))
    assert "draws 5 tokens after each prompt" in page
    assert "step losses differ by" not in page


def test_the_floor_of_drawing_comes_before_that_of_training():
    """10 FLOPs at 100 FLOP/s and 20 bytes at 10 byte/s: 2 s; then 1 s of training. A step takes 1 s."""
    made = summarise([drew()], [], MACHINE, WITH_DRAWING, baseline="trl", dropped=1)
    assert made.sides["ftlib"].efficiency == 3.0


def test_every_side_of_ours_is_compared_with_every_other_in_its_environment():
    labels = ["trl", "trl-tuned", *OURS, "trl+allocator", "ftlib+allocator"]
    made = summarise(
        [run(label, 0, 1.0) for label in labels], [], MACHINE, WORKLOAD, baseline="trl", dropped=1
    )
    assert {(each.label, each.baseline) for each in made.comparisons} == {
        *((ours, theirs) for ours in OURS for theirs in ("trl", "trl-tuned")),
        ("ftlib+allocator", "trl+allocator"),
    }


def test_versions_that_are_others_than_the_projects_are_told():
    machine = dataclasses.replace(MACHINE, versions={"torch": "2", "trl": "1.16"})
    own = dataclasses.replace(run("trl", 0, 4.0), versions={"torch": "2", "trl": "1.12"})
    page = markdown(dataclasses.replace(result(), machine=machine, runs=[own, run("ftlib", 0, 1.0)]))
    assert "trl ran with trl 1.12." in page


# -- the environment -------------------------------------------------------------------------------


def test_an_environment_counts_once_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda command, check: pytest.fail(f"started {command}"))
    assert environments.existing(ENVIRONMENT) is None
    folder = environments._folder(ENVIRONMENT)
    folder.mkdir(parents=True)
    assert environments.existing(ENVIRONMENT) is None
    (folder / environments.READY).touch()
    python = environments.existing(ENVIRONMENT)
    assert python is not None
    assert python.is_relative_to(folder)
    assert environments.make(ENVIRONMENT) == python


def test_an_environment_is_made_of_its_pins_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    commands = []

    def started(command, check):
        commands.append(command)
        Path(command[-1] if "venv" in command else tmp_path).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(subprocess, "run", started)
    python = environments.make(ENVIRONMENT)
    venv, pip = commands
    assert python.is_relative_to(tmp_path)
    assert venv[:3] == [sys.executable, "-m", "venv"]
    assert pip[0] == str(python)
    pins = Path(pip[-1]).read_text(encoding="utf-8").splitlines()[1:]
    assert all("==" in pin for pin in pins)
    assert {"trl==1.12.0", "torch==2.13.0"} <= set(pins)
    assert environments.existing(ENVIRONMENT) == python


# -- what TRL is given -----------------------------------------------------------------------------


def test_prompts_come_in_their_order_whatever_rows_are_asked_for():
    collator = ppo._InOrder([[5], [6, 7], [8, 9], [4]], 2, pad=99)
    assert [collator([]).pop("input_ids").tolist() for _ in range(3)] == [
        [[99, 5], [6, 7]],
        [[8, 9], [99, 4]],
        [[99, 5], [6, 7]],
    ]


class Tokenizer:
    """As many tokens as were added, in the three methods that are used."""

    def __init__(self, size):
        self.size, self.padding = size, None

    def __len__(self):
        return self.size

    def add_tokens(self, tokens):
        self.size += len(tokens)

    def add_special_tokens(self, tokens):
        assert tokens.keys() == {"pad_token"}
        self.padding, self.size = self.size, self.size + 1


@pytest.mark.parametrize(("tokens", "vocabulary"), [(10, 10), (10, 16), (12, 10)])
def test_padding_cannot_be_drawn(tokens, vocabulary):
    from transformers import LlamaConfig

    made = ppo._padding_outside(Tokenizer(tokens), LlamaConfig(vocab_size=vocabulary))
    assert made.padding >= vocabulary


def test_what_a_reward_model_was_asked_is_read_back_without_padding(monkeypatch):
    from transformers import AutoModelForSequenceClassification

    from tests.models_zoo import tiny_model

    monkeypatch.setattr(ppo, "NEW_TOKENS", 2)
    model = tiny_model("llama", auto=AutoModelForSequenceClassification, num_labels=1)
    kept = ppo._KeptModel(model)
    real_BL = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    hidden = model.model(input_ids=torch.tensor([[0, 5, 8, 9], [6, 7, 8, 9]]), attention_mask=real_BL)
    scores_BL1 = model.score(hidden.last_hidden_state)
    (drawn,) = kept.drawn()
    assert drawn.prompts == [[5], [6, 7]]
    assert drawn.completions == [[8, 9], [8, 9]]
    assert drawn.scores == scores_BL1[:, -1, 0].tolist()


# -- a whole benchmark -----------------------------------------------------------------------------


def baseline_python() -> str | None:
    found = environments.existing(ENVIRONMENT)
    return os.environ.get("FTLIB_BENCHMARK_PYTHON") or (None if found is None else str(found))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Result:
    """With TRL where its environment is there, else ftlib alone."""
    out, python = tmp_path_factory.mktemp("ppo"), baseline_python()
    baseline = ["--baseline", "none"] if python is None else ["--baseline-python", python]
    command = [sys.executable, "-m", "benchmarks", "ppo", "--smoke", "--data", "faq.jsonl", *baseline]
    process = subprocess.run(
        [*command, "--out", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    (file,) = out.glob("*-ppo.json")
    read: Result = records.read(file)
    return read


@pytest.mark.long
@pytest.mark.oracle
def test_every_side_ran_timed_and_in_float32(whole):
    theirs = [] if baseline_python() is None else ["trl"]
    assert whole.complete
    assert [each.side for each in whole.runs] == [*theirs, *OURS]
    assert [(each.side, each.weights_dtype) for each in whole.parity_runs] == [
        (side, "torch.float32") for side in (*theirs, *OURS)
    ]


@pytest.mark.long
@pytest.mark.oracle
def test_the_work_of_all_sides_is_the_same(whole):
    assert whole.summary.problems == []
    assert whole.workload.rows == STEPS * ROWS
    every = [*whole.runs, *whole.parity_runs]
    work = {tuple((s.rows_sha256, s.tokens, s.trained_tokens) for s in each.steps) for each in every}
    assert len(work) == 1
    assert {step.trained_tokens for each in every for step in each.steps} == {ROWS * ppo.NEW_TOKENS}
    for each in whole.runs:
        assert {step.measures["optimizer_steps"] for step in each.steps} == {ppo.UPDATES}


@pytest.mark.long
@pytest.mark.oracle
def test_every_side_trained_its_adapter_and_nothing_else(whole):
    for each in [*whole.runs, *whole.parity_runs]:
        assert all(step.grad_norm > 0 for step in each.steps)
        assert each.adapter_delta > 0
        before, after = each.base_sha256
        assert before == after


@pytest.mark.long
@pytest.mark.oracle
def test_the_steps_of_our_sides_are_split_into_phases(whole):
    for side in OURS:
        (ours,) = (each for each in whole.runs if each.side == side)
        for step in ours.steps:
            assert 0 < step.measures["seconds_drawing"] + step.measures["seconds_scoring"] < step.seconds


@pytest.mark.long
@pytest.mark.oracle
def test_trl_1_12_ran_beside_them(whole):
    if baseline_python() is None:
        pytest.skip(f"no environment {ENVIRONMENT}; python -m benchmarks ppo --smoke makes it")
    (trl,) = (each for each in whole.runs if each.side == "trl")
    assert trl.versions["trl"].startswith("1.12.")
    assert {each.baseline for each in whole.summary.comparisons} == {"trl"}
    assert {each.label for each in whole.summary.comparisons} == set(OURS)
