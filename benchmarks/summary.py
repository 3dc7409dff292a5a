"""From runs to ratios, ranges and checks. Plain arithmetic on the records.

A ratio is taken within a pair, whose two runs followed each other directly; published are the median
over the pairs and the range. Runs that were replaced (`disturbed`) count nowhere but in the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from benchmarks.drawn import problems_of_drawing, scores_apart
from benchmarks.floor import floor_seconds
from benchmarks.records import Comparison, Machine, Run, Side, Step, Summary, Workload

__all__ = ["CLOSE", "OURS", "PARITY", "pair_apart", "step_seconds", "summarise"]

OURS = "ftlib"
SPREAD = 0.10  # of one label's median steps, beyond which a pair is run again
PARITY = 1e-5  # relative, float32
START = 1e-4  # nats, from a loss that is known beforehand
CLOSE = 2e-2  # nats, between the timed runs and float32


def epoch_seconds(run: Run, dropped: int) -> list[float]:
    """Median step of each epoch, the first `dropped` of the run left out."""
    size = len(run.steps) // run.epochs
    starts = range(0, len(run.steps), size)
    return [
        median(step.seconds for step in run.steps[max(start, dropped) : start + size]) for start in starts
    ]


def step_seconds(run: Run, dropped: int) -> float:
    """Median step; of several epochs, which may differ in kind, the mean of their medians."""
    return fmean(epoch_seconds(run, dropped))


def _seconds_in_all(run: Run, dropped: int) -> float:
    """A step with its share of what was done ahead."""
    return step_seconds(run, dropped) + run.ahead_seconds / len(run.steps)


def pair_apart(runs: Sequence[Run], dropped: int) -> int | None:
    """The pair to run again: the farthest from a label's median, where its runs spread over `SPREAD`."""
    farthest: list[tuple[float, int]] = []
    valid = [run for run in runs if not run.disturbed]
    for label in {run.label for run in valid}:
        times = {run.pair: step_seconds(run, dropped) for run in valid if run.label == label}
        if _spread(list(times.values())) > SPREAD:
            middle = median(times.values())
            farthest += [(abs(seconds - middle) / middle, pair) for pair, seconds in times.items()]
    return max(farthest)[1] if farthest else None


def _spread(seconds: Sequence[float]) -> float:
    """Range over median."""
    return (max(seconds) - min(seconds)) / median(seconds)


def summarise(
    runs: Sequence[Run],
    parity_runs: Sequence[Run],
    machine: Machine,
    workload: Workload,
    *,
    baseline: str,
    dropped: int,
) -> Summary:
    """Everything the runs say.

    Args:
        baseline: label of the side whose seeds give the range of evaluation losses.
        dropped: first steps of each run that are not timed.
    """
    valid = [run for run in runs if not run.disturbed]
    labels = list(dict.fromkeys(run.label for run in valid))
    by_label = {label: [run for run in valid if run.label == label] for label in labels}
    floors = _floors(machine, workload)
    drawing = workload.drawing
    seeds = [run.eval_loss for run in by_label.get(baseline, []) if run.eval_loss is not None]
    seed_range = [min(seeds), max(seeds)] if seeds else []
    comparisons = [
        compared
        for label in labels
        if not label.startswith(OURS)
        for ours in _counterparts(label, labels)
        if (compared := _comparison(by_label, ours, label, dropped, alike=drawing is None)) is not None
    ]
    parity = _parity(parity_runs) if drawing is None else None
    problems = [problem for run in [*valid, *parity_runs] for problem in _unproven(run)]
    problems += _different_work([*valid, *parity_runs])
    problems += _wrong_start([*valid, *parity_runs], workload.starts_at)
    if drawing is not None:
        problems += problems_of_drawing([*valid, *parity_runs], drawing, workload.batch_size)
    exact = parity_runs if drawing is None else ()  # what float32 losses are compared with
    sides = {label: _side(members, exact, floors, dropped) for label, members in by_label.items()}
    problems += [
        f"{label}: step losses differ from float32 by up to {side.rounding:.2g}, over {CLOSE:g}"
        for label, side in sides.items()
        if label.startswith(OURS) and side.rounding is not None and side.rounding > CLOSE
    ]
    if parity is not None and parity > PARITY:
        problems.append(f"float32: losses of a step differ by up to {parity:.2g} relative, over {PARITY:g}")
    return Summary(
        sides=sides,
        comparisons=comparisons,
        parity=parity,
        seed_range=seed_range,
        problems=problems,
        notes=[
            *_notes(runs, by_label, dropped),
            *_outside(by_label.get(OURS, []), seeds),
            *scores_apart({label: side.scores for label, side in sides.items()}, baseline),
        ],
    )


def _floors(machine: Machine, workload: Workload) -> list[float]:
    """Of each step, in seconds: of drawing and of training on what was drawn, one after the other."""

    def seconds(flops: Sequence[float], moved: Sequence[float]) -> list[float]:
        rates = {"matmul_flops": max(machine.matmul_flops.values()), "copy_bytes": machine.copy_bytes}
        return [floor_seconds(work, size, **rates) for work, size in zip(flops, moved, strict=True)]

    training = seconds(workload.floor_flops, workload.floor_bytes)
    if workload.drawing is None:
        return training
    drawing = seconds(workload.drawing.floor_flops, workload.drawing.floor_bytes)
    return [one + other for one, other in zip(drawing, training, strict=True)]


def _side(runs: Sequence[Run], parity_runs: Sequence[Run], floors: Sequence[float], dropped: int) -> Side:
    seconds = [step_seconds(run, dropped) for run in runs]
    timed = [run.steps[dropped:] for run in runs]
    steps = len(floors)
    return Side(
        runs=len(runs),
        step_seconds=median(seconds),
        step_range=[min(seconds), max(seconds)],
        epoch_seconds=_medians([epoch_seconds(run, dropped) for run in runs]),
        ahead_seconds=median(run.ahead_seconds for run in runs),
        spread=_spread(seconds),
        tokens_per_second=median(_speed(run_steps) for run_steps in timed),
        peak_bytes=int(median(run.peak_bytes for run in runs)),
        efficiency=median(
            floor / step.seconds
            for run_steps in timed
            for floor, step in zip(floors[dropped:], run_steps, strict=True)
        ),
        rounding=_rounding(runs, parity_runs),
        eval_losses=[run.eval_loss for run in runs if run.eval_loss is not None],
        eval_accuracies=[run.eval_accuracy for run in runs if run.eval_accuracy is not None],
        faults_per_step=median((run.minor_faults + run.major_faults) / steps for run in runs),
        cpu_seconds_per_step=median((run.user_seconds + run.system_seconds) / steps for run in runs),
        involuntary_switches=int(median(run.involuntary_switches for run in runs)),
        scores=[
            fmean(step.measures["score"] for step in run.steps)
            for run in runs
            if all("score" in step.measures for step in run.steps)
        ],
        measures={
            name: median(median(step.measures[name] for step in run_steps) for run_steps in timed)
            for name in timed[0][0].measures
        },
    )


def _medians(rows: Sequence[Sequence[float]]) -> list[float]:
    """Of each column."""
    return [median(column) for column in zip(*rows, strict=True)]


def _rounding(runs: Sequence[Run], parity_runs: Sequence[Run]) -> float | None:
    """Against the float32 run that started from the same adapter; the sides' float32 runs agree."""
    differences = [
        abs(timed.loss - exact.loss)
        for run in runs
        for reference in parity_runs[:1]
        if run.pair == reference.pair
        for timed, exact in zip(run.steps, reference.steps, strict=False)
    ]
    return max(differences, default=None)


def _speed(steps: Sequence[Step]) -> float:
    """Real tokens per second."""
    return sum(step.tokens for step in steps) / sum(step.seconds for step in steps)


def _counterparts(label: str, labels: Sequence[str]) -> list[str]:
    """Our runs in the same environment, which labels carry after a plus sign; else in the common one."""
    ours = [each.partition("+") for each in labels if each.startswith(OURS)]
    environments = (label.partition("+")[2], "")
    found = [["".join(each) for each in ours if each[2] == environment] for environment in environments]
    return next(filter(None, found), [])


def _comparison(
    by_label: dict[str, list[Run]], ours: str, theirs: str, dropped: int, *, alike: bool
) -> Comparison | None:
    """None as long as no pair has both.

    Args:
        alike: whether both train on the same tokens, so that their losses can be compared.
    """
    pairs = [(a, b) for a in by_label.get(ours, []) for b in by_label[theirs] if a.pair == b.pair]
    if not pairs:
        return None
    speeds = [step_seconds(b, dropped) / step_seconds(a, dropped) for a, b in pairs]
    return Comparison(
        label=ours,
        baseline=theirs,
        speed=median(speeds),
        speed_range=[min(speeds), max(speeds)],
        epoch_speeds=_medians(
            [
                [
                    theirs / ours
                    for ours, theirs in zip(epoch_seconds(a, dropped), epoch_seconds(b, dropped), strict=True)
                ]
                for a, b in pairs
            ]
        ),
        speed_in_all=median(_seconds_in_all(b, dropped) / _seconds_in_all(a, dropped) for a, b in pairs),
        memory=median(a.peak_bytes / b.peak_bytes for a, b in pairs),
        loss_difference=max(
            abs(left.loss - right.loss)
            for a, b in pairs
            for left, right in zip(a.steps, b.steps, strict=True)
        )
        if alike
        else None,
        eval_difference=max(abs((a.eval_loss or 0.0) - (b.eval_loss or 0.0)) for a, b in pairs),
    )


def _parity(runs: Sequence[Run]) -> float | None:
    if len({run.side for run in runs}) < 2:
        return None
    ours = next(run for run in runs if run.side == OURS)
    return max(
        abs(left.loss - right.loss) / abs(right.loss)
        for run in runs
        if run is not ours
        for left, right in zip(ours.steps, run.steps, strict=True)
    )


def _unproven(run: Run) -> list[str]:
    """What is missing for the run to count as training."""
    where = f"{run.label}, pair {run.pair}, {run.precision}"
    problems = []
    if not all(step.grad_norm > 0 for step in run.steps):
        problems.append(f"{where}: a step without a gradient")
    if not run.adapter_delta > 0:
        problems.append(f"{where}: the adapter did not move")
    if len(set(run.base_sha256)) != 1:
        problems.append(f"{where}: the base weights changed")
    return problems


def _different_work(runs: Sequence[Run]) -> list[str]:
    """Steps whose rows are not those of the first run."""
    problems = []
    for run in runs[1:]:
        together = zip(run.steps, runs[0].steps, strict=False)  # parity runs are shorter
        wrong = [
            number for number, (one, other) in enumerate(together, start=1) if _work(one) != _work(other)
        ]
        if wrong:
            problems.append(f"{run.label}, pair {run.pair}: rows or labels are others in steps {wrong}")
    return problems


def _wrong_start(runs: Sequence[Run], expected: float | None) -> list[str]:
    if expected is None:
        return []
    return [
        f"{run.label}, pair {run.pair}, {run.precision}: expected to start at a loss of {expected:.6f}, "
        f"started at {run.steps[0].loss:.6f}"
        for run in runs
        if abs(run.steps[0].loss - expected) > START
    ]


def _work(step: Step) -> tuple[str, int, int]:
    return step.rows_sha256, step.tokens, step.trained_tokens


def _outside(runs: Sequence[Run], seeds: Sequence[float]) -> list[str]:
    """Whether our evaluation loss lies where other seeds take the baseline's; from three seeds on."""
    losses = [run.eval_loss for run in runs if run.eval_loss is not None]
    if len(seeds) < 3 or not losses or min(seeds) <= median(losses) <= max(seeds):
        return []
    return [f"evaluation loss {median(losses):.4f}, outside the range of the baseline's seeds"]


def _notes(runs: Sequence[Run], by_label: dict[str, list[Run]], dropped: int) -> list[str]:
    notes = [
        f"{run.label}, pair {run.pair}: run again, its median step was {step_seconds(run, dropped):.3f} s"
        for run in runs
        if run.disturbed
    ]
    for label, members in by_label.items():
        wide = _spread([step_seconds(run, dropped) for run in members])
        if wide > SPREAD:
            notes.append(f"{label}: its runs still spread over {wide:.0%}")
    return notes
