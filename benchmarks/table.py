"""A result as a page of Markdown: the comparison, the losses, the machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.records import Machine, Result, Run, Side, Summary
from benchmarks.summary import CLOSE, PARITY

__all__ = ["markdown"]

GIB = 2**30
_READING = (
    "Efficiency: the least time a step can take on this machine, over the time it took. Off float32: how "
    "far the losses of the first steps are from those of a float32 run, which are the same for both."
)


def markdown(result: Result) -> str:
    """The page. An unfinished result says so in its first line."""
    if result.summary is None:
        return f"# {result.task}: nothing measured yet\n"
    unfinished = "" if result.complete else " (unfinished)"
    parts = [
        f"# {result.task}: ftlib and {result.baseline}{unfinished}",
        f"{result.date}, commit {result.commit}. `python -m benchmarks {' '.join(result.command)}`",
        _workload(result),
        _sides(result.summary.sides),
        _READING,
        _comparisons(result.summary),
        _losses(result.runs, result.parity_runs),
        _checks(result.summary),
        _machine(result.machine),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _workload(result: Result) -> str:
    workload = result.workload
    steps = result.runs[0].steps if result.runs else []
    tokens, trained = sum(step.tokens for step in steps), sum(step.trained_tokens for step in steps)
    lengths = (
        f" of {tokens / workload.rows:.0f} tokens, {trained / tokens:.0%} of them trained" if tokens else ""
    )
    return (
        f"{workload.model}, LoRA r={workload.adapter['r']}, {len(workload.floor_flops)} steps of "
        f"{workload.batch_size} rows{lengths}; the first {result.dropped_steps} steps are not timed. "
        f"Data: {workload.data}."
    )


def _machine(machine: Machine) -> str:
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in machine.matmul_flops.items())
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return (
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / GIB:.0f} GiB, {machine.system}. "
        f"Matrix product: {rates}; copy {machine.copy_bytes / 1e9:.1f} GB/s. {versions}."
    )


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
                _range([min(side.eval_losses), max(side.eval_losses)], 4) if side.eval_losses else "",
                f"{side.faults_per_step:,.0f}",
            ]
            for label, side in sides.items()
        ],
    )


def _comparisons(summary: Summary) -> str:
    return _table(
        ["", "times as fast", "range", "memory", "step losses differ by", "evaluation losses by"],
        [
            [
                f"{each.label} against {each.baseline}",
                f"{each.speed:.2f}",
                _range(each.speed_range, 2),
                f"{each.memory:.2f}",
                f"{each.loss_difference:.1e}",
                f"{each.eval_difference:.1e}",
            ]
            for each in summary.comparisons
        ],
    )


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


def _checks(summary: Summary) -> str:
    lines = []
    if summary.parity is not None:
        lines.append(
            f"float32: losses of a step differ by up to {summary.parity:.1e} relative, allowed {PARITY:g}"
        )
    if summary.seed_range:
        lines.append(f"evaluation loss of the baseline over the seeds: {_range(summary.seed_range, 4)}")
    if summary.problems:
        lines += [f"**failed**: {problem}" for problem in summary.problems]
    else:
        lines.append(
            "same rows and labels in every step, a gradient in every step, every adapter moved, "
            f"base weights unchanged, ftlib's losses within {CLOSE:g} nats of float32"
        )
    return "\n".join(f"- {line}" for line in [*lines, *summary.notes])


def _range(values: Sequence[float], digits: int) -> str:
    low, high = values
    return f"{low:.{digits}f} - {high:.{digits}f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
