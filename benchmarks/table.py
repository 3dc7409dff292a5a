"""A result as a page of Markdown: the comparison, the losses, the machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.records import Drawing, Machine, Result, Run, Side, Summary
from benchmarks.summary import CLOSE, PARITY
from benchmarks.tasks import ALONE

__all__ = ["markdown"]

GIB = 2**30
_READING = "Efficiency: the least time a step can take on this machine, over the time it took."
_ROUNDING = (
    " Off float32: how far the losses of the first steps are from those of a float32 run, which are the same "
    "for both."
)
_DRAWING = (
    " Evaluation loss: minus the mean score of completions of held-out prompts. Score: of a run's own "
    "completions, their mean."
)
_AHEAD = (
    " S ahead: spent between building the trainer and its first step, on set-up and perhaps on a reference's "
    "log-probabilities; no part of the steps."
)


def markdown(result: Result) -> str:
    """The page. An unfinished result says so in its first line."""
    if result.summary is None:
        return f"# {result.task}: nothing measured yet\n"
    unfinished = "" if result.complete else " (unfinished)"
    baseline = "alone" if result.baseline == ALONE else f"and {result.baseline}"
    parts = [
        f"# {result.task}: ftlib {baseline}{unfinished}",
        f"{result.date}, commit {result.commit}. `python -m benchmarks {' '.join(result.command)}`",
        _workload(result),
        _sides(result.summary.sides),
        _reading(result.summary),
        _comparisons(result.summary),
        _measures(result.summary.sides),
        _epochs(result.summary),
        _losses(result.runs, result.parity_runs),
        _checks(result.summary, result.workload.drawing),
        _machine(result.machine),
        _other_versions(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _workload(result: Result) -> str:
    workload = result.workload
    steps = result.runs[0].steps if result.runs else []
    tokens, trained = sum(step.tokens for step in steps), sum(step.trained_tokens for step in steps)
    twice = " (the prompt counted twice)" if workload.unit == "pairs" else ""
    lengths = (
        f" of {tokens / workload.rows / workload.epochs:.0f} tokens{twice}, "
        f"{trained / tokens:.0%} of them scored"
        if tokens
        else ""
    )
    epochs = f" in {workload.epochs} epochs" if workload.epochs > 1 else ""
    differing = (
        f" {workload.differing} {workload.unit} that the baseline tokenises differently are left out."
        if workload.differing
        else ""
    )
    return (
        f"{workload.model}, LoRA r={workload.adapter['r']}, {len(workload.floor_flops)} steps{epochs} of "
        f"{workload.batch_size} {workload.unit}{lengths}; the first {result.dropped_steps} steps are not "
        f"timed. Data: {workload.data}.{differing}{_drawn(workload.drawing)}"
    )


def _drawn(drawing: Drawing | None) -> str:
    if drawing is None:
        return ""
    return (
        f" In every step each side draws {drawing.new_tokens} tokens after each prompt, at temperature "
        f"{drawing.temperature:g}, and makes {drawing.updates} optimiser steps on them."
    )


def _machine(machine: Machine) -> str:
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in machine.matmul_flops.items())
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return (
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / GIB:.0f} GiB, {machine.system}. "
        f"Matrix product: {rates}; copy {machine.copy_bytes / 1e9:.1f} GB/s. {versions}."
    )


def _other_versions(result: Result) -> str:
    """Of the runs in an environment of their own."""
    found: dict[str, list[str]] = {}
    for run in result.runs:
        own = ", ".join(
            f"{name} {version}"
            for name, version in run.versions.items()
            if version != result.machine.versions.get(name)
        )
        if own and run.side not in found.setdefault(own, []):
            found[own].append(run.side)
    return " ".join(f"{' and '.join(sides)} ran with {own}." for own, sides in found.items())


def _sides(sides: dict[str, Side]) -> str:
    return _table(
        [
            "",
            "runs",
            "s per step",
            "range",
            "tokens/s",
            "peak GiB",
            "efficiency",
            "off float32",
            "evaluation loss",
            "accuracy",
            "score",
            "s ahead",
            "faults/step",
        ],
        [
            [
                label,
                str(side.runs),
                f"{side.step_seconds:.3f}",
                _range(side.step_range, 3),
                f"{side.tokens_per_second:,.0f}",
                f"{side.peak_bytes / GIB:.2f}",
                f"{side.efficiency:.0%}",
                "" if side.rounding is None else f"{side.rounding:.1e}",
                _extent(side.eval_losses, 4),
                _extent(side.eval_accuracies, 2),
                _extent(side.scores, 3),
                f"{side.ahead_seconds:.1f}" if _worked_ahead(side) else "",
                f"{side.faults_per_step:,.0f}",
            ]
            for label, side in sides.items()
        ],
    )


def _comparisons(summary: Summary) -> str:
    return _table(
        [
            "",
            "times as fast",
            "range",
            "with what is done ahead",
            "memory",
            "step losses differ by",
            "evaluation losses by",
        ],
        [
            [
                f"{each.label} against {each.baseline}",
                f"{each.speed:.2f}",
                _range(each.speed_range, 2),
                f"{each.speed_in_all:.2f}" if _worked_ahead(summary.sides[each.baseline]) else "",
                f"{each.memory:.2f}",
                "" if each.loss_difference is None else f"{each.loss_difference:.1e}",
                f"{each.eval_difference:.1e}",
            ]
            for each in summary.comparisons
        ],
    )


def _reading(summary: Summary) -> str:
    sides = summary.sides.values()
    told = [
        (_ROUNDING, any(side.rounding is not None for side in sides)),
        (_DRAWING, any(side.scores for side in sides)),
        (_AHEAD, any(map(_worked_ahead, sides))),
    ]
    return _READING + "".join(text for text, applies in told if applies)


def _measures(sides: dict[str, Side]) -> str:
    """The task's own numbers of a median step; nothing where there are none."""
    names = list(dict.fromkeys(name for side in sides.values() for name in side.measures))
    if not names:
        return ""
    rows = [
        [label, *(f"{side.measures[name]:.4g}" if name in side.measures else "" for name in names)]
        for label, side in sides.items()
    ]
    return "Of a step:\n\n" + _table(["", *(name.replace("_", " ") for name in names)], rows)


def _worked_ahead(side: Side) -> bool:
    """Whether it spent more than a step on training before the first step."""
    return side.ahead_seconds > side.step_seconds


def _epochs(summary: Summary) -> str:
    """Nothing for a single epoch."""
    count = max((len(side.epoch_seconds) for side in summary.sides.values()), default=0)
    if count < 2:
        return ""
    seconds = [
        [f"{label}, s per step", *(f"{value:.3f}" for value in side.epoch_seconds)]
        for label, side in summary.sides.items()
    ]
    speeds = [
        [f"{each.label} against {each.baseline}, times as fast", *(f"{v:.2f}" for v in each.epoch_speeds)]
        for each in summary.comparisons
    ]
    return _table(["", *(f"epoch {number + 1}" for number in range(count))], [*seconds, *speeds])


def _losses(runs: Sequence[Run], parity_runs: Sequence[Run]) -> str:
    """Losses of the first pair's runs and of the float32 runs, one column each."""
    shown = [run for run in runs if run.pair == 0 and not run.disturbed and "+" not in run.label]
    columns = [*((run.label, run) for run in shown), *((f"{run.label}, float32", run) for run in parity_runs)]
    if not columns:
        return ""
    count = max(len(run.steps) for _, run in columns)
    rows = [[str(step + 1), *(_loss(run, step) for _, run in columns)] for step in range(count)]
    return "Loss of each step:\n\n" + _table(["step", *(label for label, _ in columns)], rows)


def _loss(run: Run, step: int) -> str:
    return f"{run.steps[step].loss:.6f}" if step < len(run.steps) else ""


def _checks(summary: Summary, drawing: Drawing | None) -> str:
    lines = []
    if summary.parity is not None:
        lines.append(
            f"float32: losses of a step differ by up to {summary.parity:.1e} relative, allowed {PARITY:g}"
        )
    if summary.seed_range:
        lines.append(f"evaluation loss of the baseline over the seeds: {_range(summary.seed_range, 4)}")
    if summary.problems:
        lines += [f"**failed**: {problem}" for problem in summary.problems]
    elif drawing is None:
        lines.append(
            "same rows and labels in every step, a gradient in every step, every adapter moved, "
            f"base weights unchanged, ftlib's losses within {CLOSE:g} nats of float32"
        )
    else:
        lines.append(
            "same prompts, completions of one length and as many optimiser steps in every step, scores as "
            "plain transformers gives them, in float32 the first minibatch at ratio 1 and the first policy "
            "equal to the reference, a gradient in every step, every adapter moved, base weights unchanged"
        )
    return "\n".join(f"- {line}" for line in [*lines, *summary.notes])


def _extent(values: Sequence[float], digits: int) -> str:
    return _range([min(values), max(values)], digits) if values else ""


def _range(values: Sequence[float], digits: int) -> str:
    low, high = values
    return f"{low:.{digits}f} - {high:.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns without any entry are left out, and so is a table without rows."""
    rows = list(rows)
    if not rows:
        return ""
    columns = [column for column in zip(head, *rows, strict=True) if any(column[1:])]
    lines = [list(line) for line in zip(*columns, strict=True)]
    lines.insert(1, ["---"] * len(columns))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
