"""Checks of a comparison whose sides draw their own completions: losses differ, and other things must not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.records import Drawing, Run

__all__ = ["EXACT_UPDATES", "problems_of_drawing", "scores_apart"]

EXACT_UPDATES = 1  # optimiser steps of a float32 step: its ratio is then that of the first minibatch
RATIO = 1e-3  # from 1, float32
DIVERGENCE = 1e-2  # nats per completion, float32, while the policy still is the reference
SCORE = 1e-3  # between a side's mean score and that of plain transformers


def problems_of_drawing(runs: Sequence[Run], drawing: Drawing, batch_size: int) -> list[str]:
    """What makes the work of these runs another than the workload's."""
    return [
        f"{run.label}, pair {run.pair}, {run.precision}: {wrong}"
        for run in runs
        for wrong in _wrong(run, drawing, batch_size)
    ]


def _wrong(run: Run, drawing: Drawing, batch_size: int) -> Iterator[str]:
    exact = run.precision == "float32"
    drawn = batch_size * drawing.new_tokens
    updates = EXACT_UPDATES if exact else drawing.updates
    if {step.trained_tokens for step in run.steps} != {drawn}:
        yield f"expected {drawn} tokens drawn in every step, got others"
    if {step.measures["optimizer_steps"] for step in run.steps} != {updates}:
        yield f"expected {updates} optimiser steps in every step, got others"
    score = max(step.measures["score_error"] for step in run.steps)
    if score > SCORE:
        yield f"scores are {score:.2g} off those of plain transformers"
    if exact:
        ratio = max(step.measures["ratio_error"] for step in run.steps)
        if ratio > RATIO:
            yield f"expected the first minibatch at ratio 1, got {ratio:.2g} off it"
        if abs(run.steps[0].measures["kl"]) > DIVERGENCE:
            yield f"expected to start at the reference, got a KL of {run.steps[0].measures['kl']:.2g}"


def scores_apart(scores: Mapping[str, Sequence[float]], baseline: str) -> list[str]:
    """Sides whose runs' scores lie all on one side of the baseline's; from three runs on."""
    theirs = scores.get(baseline, [])
    if len(theirs) < 3:
        return []
    return [
        f"{label}: scores of {min(own):.3f} - {max(own):.3f} lie outside the baseline's seeds, "
        f"{min(theirs):.3f} - {max(theirs):.3f}"
        for label, own in scores.items()
        if own and (min(own) > max(theirs) or max(own) < min(theirs))
    ]
