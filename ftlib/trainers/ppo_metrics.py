"""The numbers of a PPO row: those of all optimiser steps together, and those that are no means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from time import perf_counter

import torch

from ftlib.batches import Mean
from ftlib.engine.engine import StepResult

__all__ = ["derived", "merged", "on_cpu", "speed"]

SPREADS = ("score", "advantage", "return")
ROUNDING = 2e-6  # a deviation below this share of the mean is the rounding of equal float32 numbers


def derived(row: Mapping[str, float]) -> dict[str, float]:
    """The row with standard deviations and the explained variance, and without second moments.

        std_x = sqrt(E[x^2] - E[x]^2),   EV = 1 - Var(return - value) / Var(return)

    Args:
        row: means over rollouts or sampled tokens.
    """
    told = dict(row)
    variances = {name: _variance(told, name) for name in (*SPREADS, "error")}
    for name in SPREADS:
        if not math.isnan(variances[name]):
            told[f"{name}_std"] = math.sqrt(variances[name])
    if variances["return"] > 0 and not math.isnan(variances["error"]):
        told["explained_variance"] = 1 - variances["error"] / variances["return"]
    hidden = {f"{name}_squared" for name in (*SPREADS, "error")} | {"error"}
    return {name: value for name, value in told.items() if name not in hidden}


def _variance(row: Mapping[str, float], name: str) -> float:
    if f"{name}_squared" not in row:
        return math.nan
    variance = row[f"{name}_squared"] - row[name] ** 2
    return variance if variance > (ROUNDING * row[name]) ** 2 else 0.0


def merged(
    results: Sequence[StepResult],
) -> tuple[list[StepResult], dict[str, Mean], dict[str, Mean]]:
    """Optimiser steps as one: those that count, and the sums of their terms and metrics, on the CPU.

    Steps left out because they were not finite count only where all were.
    """
    counted = [result for result in results if not result.skipped] or list(results)
    terms: dict[str, Mean] = {}
    metrics: dict[str, Mean] = {}
    for result in counted:
        for sums, means in ((terms, result.terms), (metrics, result.metrics)):
            for name, mean in means.items():
                sums[name] = sums[name] + mean if name in sums else mean
    return counted, _all_on_cpu(terms), _all_on_cpu(metrics)


def on_cpu(mean: Mean) -> Mean:
    """The mean where a row is written."""
    return Mean(mean.sum.detach().cpu(), mean.count.detach().cpu())


def speed(tokens: float, started: float) -> Mean:
    """Tokens per second since `started`, a time of `perf_counter`."""
    return Mean(torch.tensor(float(tokens)), torch.tensor(perf_counter() - started))


def _all_on_cpu(means: Mapping[str, Mean]) -> dict[str, Mean]:
    return {name: on_cpu(mean) for name, mean in means.items()}
