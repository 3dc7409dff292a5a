"""Ratios, ranges and checks, from runs written by hand."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import records
from benchmarks.floor import floor_seconds, forward_bytes, forward_flops, training_bytes, training_flops
from benchmarks.records import Machine, Result, Run, Step, Workload
from benchmarks.summary import pair_apart, step_seconds, summarise
from benchmarks.table import markdown

SIZES = {"body": 100, "head": 50, "adapter": 10, "layers": 2, "hidden": 4, "attention": 8}


def step(seconds: float, loss: float = 2.0, rows: str = "a", grad_norm: float = 1.0) -> Step:
    return Step(seconds, seconds, loss, grad_norm, tokens=100, trained_tokens=60, rows_sha256=rows)


def run(label: str, pair: int, seconds: float, *, loss: float = 2.0, **changes: object) -> Run:
    """A first step of 100 s that is not to count, then two of the given length."""
    made = Run(
        label=label,
        side=label.partition("+")[0],
        pair=pair,
        precision="default",
        environment={},
        threads=2,
        weights_dtype="torch.float32",
        steps=[step(100.0, loss), step(seconds, loss), step(seconds, loss)],
        peak_bytes={"trl": 400, "ftlib": 100}.get(label.partition("+")[0], 300),
        user_seconds=3.0,
        system_seconds=0.0,
        minor_faults=6,
        major_faults=0,
        involuntary_switches=0,
        wall_seconds=1.0,
        ahead_seconds=0.0,
        base_sha256=["x", "x"],
        adapter_delta=0.1,
        eval_loss=loss,
    )
    return dataclasses.replace(made, **changes)


MACHINE = Machine("", [], 2, 1, "", "", [0.0], {}, {"bfloat16": 100.0, "float32": 10.0}, 10.0)
WORKLOAD = Workload(
    data="",
    data_sha256="",
    model="",
    model_sha256="",
    unit="rows",
    rows=3,
    held_out=1,
    left_out=0,
    differing=0,
    max_length=8,
    batch_size=1,
    epochs=1,
    starts_at=None,
    learning_rate=1e-4,
    adapter={"r": 1},
    seeds={},
    sizes=SIZES,
    floor_flops=[100.0] * 3,
    floor_bytes=[1.0] * 3,
)


def summary(*runs: Run, parity: tuple[Run, ...] = (), workload: Workload = WORKLOAD):
    return summarise(runs, parity, MACHINE, workload, baseline="trl", dropped=1)


def test_ratios_are_taken_within_pairs():
    """Pairs of 6/1, 8/2 and 10/1 s: ratios 6, 4, 10, their median 6; medians of the sides would give 8."""
    pairs = [(6.0, 1.0), (8.0, 2.0), (10.0, 1.0)]
    runs = [r for i, (trl, ours) in enumerate(pairs) for r in (run("trl", i, trl), run("ftlib", i, ours))]
    (compared,) = summary(*runs).comparisons
    assert (compared.speed, compared.speed_range, compared.memory) == (6.0, [4.0, 10.0], 0.25)


def test_the_pair_that_stands_apart_is_run_again_until_the_runs_agree():
    """4.0, 4.2 and 5.0 s spread over 24 % of the median; without the last, over 5 %."""
    near = [run("trl", 0, 4.0), run("trl", 1, 4.2)]
    assert pair_apart([*near, run("trl", 2, 5.0)], dropped=1) == 2
    assert pair_apart([*near, run("trl", 2, 5.0, disturbed=True), run("trl", 2, 4.1)], dropped=1) is None


def test_an_evaluation_loss_outside_the_seeds_of_the_baseline_is_noted():
    seeds = [run("trl", i, 4.0, eval_loss=loss) for i, loss in enumerate([1.0, 1.1, 1.2])]
    assert summary(*seeds, run("ftlib", 0, 1.0, eval_loss=1.15)).notes == []
    (note,) = summary(*seeds, run("ftlib", 0, 1.0, eval_loss=1.3)).notes
    assert "1.3000, outside" in note


def test_a_pair_that_was_run_again_counts_once():
    runs = [
        run("trl", 0, 9.0, disturbed=True),
        run("ftlib", 0, 1.0, disturbed=True),
        run("trl", 0, 4.0),
        run("ftlib", 0, 1.0),
    ]
    made = summary(*runs)
    assert made.comparisons[0].speed == 4.0
    assert made.sides["trl"].runs == 1
    assert len(made.notes) == 2


def test_runs_in_another_environment_are_compared_with_each_other():
    runs = [
        run("trl", 0, 4.0),
        run("ftlib", 0, 1.0),
        run("trl+allocator", 0, 6.0),
        run("ftlib+allocator", 0, 2.0),
    ]
    found = {(each.label, each.baseline): each.speed for each in summary(*runs).comparisons}
    assert found == {("ftlib", "trl"): 4.0, ("ftlib+allocator", "trl+allocator"): 3.0}


def test_efficiency_is_floor_over_time():
    """100 FLOPs at 100 FLOP/s take 1 s, the byte 0.1 s: a step of 4 s reaches a quarter."""
    assert summary(run("ftlib", 0, 4.0)).sides["ftlib"].efficiency == 0.25


def test_epochs_are_timed_apart_and_weigh_the_same():
    """Of 100, 4 | 2, 2 s the first is dropped: 4 and 2 s, on the mean 3; their median would be 2."""
    epochs = [step(100.0), step(4.0), step(2.0), step(2.0)]
    trl, ours = (
        run(label, 0, 1.0, steps=[step(s.seconds * factor) for s in epochs], epochs=2)
        for label, factor in (("trl", 6.0), ("ftlib", 1.0))
    )
    assert step_seconds(ours, dropped=1) == 3.0
    workload = dataclasses.replace(WORKLOAD, epochs=2, floor_flops=[100.0] * 4, floor_bytes=[1.0] * 4)
    made = summary(trl, ours, workload=workload)
    assert made.sides["ftlib"].epoch_seconds == [4.0, 2.0]
    assert made.comparisons[0].epoch_speeds == [6.0, 6.0]
    page = markdown(dataclasses.replace(result(), workload=workload, runs=[trl, ours], summary=made))
    assert "| ftlib, s per step | 4.000 | 2.000 |" in page


def test_what_is_done_ahead_counts_in_a_ratio_of_its_own():
    """6 s ahead of 3 steps are 2 s a step: 4 s become 6."""
    made = summary(run("trl", 0, 4.0, ahead_seconds=6.0), run("ftlib", 0, 1.0))
    (compared,) = made.comparisons
    assert (compared.speed, compared.speed_in_all) == (4.0, 6.0)
    page = markdown(dataclasses.replace(result(), summary=made))
    assert "| s ahead |" in page
    assert "s ahead" not in markdown(result())  # columns without an entry are left out


def test_speed_counts_real_tokens_of_timed_steps():
    assert summary(run("ftlib", 0, 4.0)).sides["ftlib"].tokens_per_second == 25.0


def test_a_fair_comparison_has_no_problems():
    assert summary(run("trl", 0, 4.0), run("ftlib", 0, 1.0)).problems == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"adapter_delta": 0.0}, "did not move"),
        ({"base_sha256": ["x", "y"]}, "base weights changed"),
        ({"steps": [step(1.0, grad_norm=0.0), step(1.0), step(1.0)]}, "without a gradient"),
        ({"steps": [step(1.0), step(1.0, rows="b"), step(1.0)]}, "rows or labels are others in steps [2]"),
        ({"steps": [step(1.0, loss=2.001), step(1.0), step(1.0)]}, "started at 2.001000"),
    ],
)
def test_each_missing_proof_is_a_problem(changes, problem):
    starting_at_2 = dataclasses.replace(WORKLOAD, starts_at=2.0)
    problems = summary(run("trl", 0, 4.0), run("ftlib", 0, 1.0, **changes), workload=starting_at_2).problems
    assert [line for line in problems if problem in line] == problems
    assert len(problems) == 1


def test_parity_is_relative_and_has_its_limit():
    """2.00004 against 2 is 2e-5 relative, twice what is allowed."""
    parity = (
        run("trl", 0, 1.0, precision="float32"),
        run("ftlib", 0, 1.0, loss=2.00004, precision="float32"),
    )
    made = summary(run("trl", 0, 4.0), run("ftlib", 0, 1.0), parity=parity)
    assert made.parity == pytest.approx(2e-5)
    assert [line for line in made.problems if line.startswith("float32")]


def test_rounding_is_measured_against_the_float32_run_of_the_same_pair():
    """Off by 0.03 in the steps of both runs: over the limit for ftlib, published for the other."""
    exact = dataclasses.replace(run("trl", 0, 1.0, precision="float32"), steps=[step(1.0)])
    runs = [run("trl", 0, 4.0, loss=2.1), run("ftlib", 0, 1.0, loss=2.03), run("ftlib", 1, 1.0, loss=9.0)]
    made = summary(*runs, parity=(exact,))
    assert made.sides["trl"].rounding == pytest.approx(0.1)
    assert made.sides["ftlib"].rounding == pytest.approx(0.03)
    assert [line.partition(":")[0] for line in made.problems] == ["ftlib"]
    assert made.comparisons[0].loss_difference == pytest.approx(0.07)


def test_floor_counts_what_its_formula_says():
    """3 and 4 tokens, 5 scored: 7 (4 x 100 + 6 x 10) + 3.5 x 2 x 2 x 8 x (9 + 16) + 4 x 50 x 5."""
    rows = [(0, 3), (0, 4)]
    assert training_flops(SIZES, rows, 5) == 7 * 460 + 2800 + 1000
    assert training_bytes(SIZES, rows) == 4 * 150 + 75 * 2 * 4 * 2 * 7


def test_floor_of_a_pair_counts_its_prompt_once():
    """3 tokens and answers of 1 and 2: T = 6, and 9 + (2 x 3 + 1) + (2 x 6 + 4) = 32 squares."""
    pair = [(3, 1, 2)]
    assert training_flops(SIZES, pair, 3) == 6 * 460 + 3.5 * 32 * 32 + 4 * 50 * 3
    assert forward_flops(SIZES, pair, 3) == 6 * 200 + 32 * 32 + 2 * 50 * 3
    assert forward_bytes(SIZES) == 2 * 150


def test_where_a_row_is_cut_into_prompt_and_answer_does_not_move_its_floor():
    assert training_flops(SIZES, [(3, 4)], 4) == training_flops(SIZES, [(0, 7)], 4)


def test_the_slower_of_arithmetic_and_memory_is_the_floor():
    assert floor_seconds(100.0, 5.0, matmul_flops=10.0, copy_bytes=5.0) == 10.0
    assert floor_seconds(100.0, 500.0, matmul_flops=10.0, copy_bytes=5.0) == 100.0


def result() -> Result:
    runs = [run("trl", 0, 4.0), run("ftlib", 0, 1.0)]
    return Result("sft", "trl", "", "", True, [], 1, {}, MACHINE, WORKLOAD, runs, [], summary(*runs))


def test_a_result_reads_back_as_it_was_written(tmp_path):
    records.write(tmp_path / "result.json", result())
    assert records.read(tmp_path / "result.json") == result()


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ('"grad_norm": 1.0', '"grad_norm": "1.0"', r"result\.json\.runs\[0\]\.steps\[0\]\.grad_norm"),
        ('"threads": 2', '"strings": 2', r"result\.json\.runs\[0\]: expected the fields"),
        ('"complete": true', '"complete": 1', r"result\.json\.complete"),
    ],
)
def test_a_file_of_another_shape_is_refused_with_its_place(tmp_path, old, new, place):
    file = tmp_path / "result.json"
    records.write(file, result())
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=place):
        records.read(file)
