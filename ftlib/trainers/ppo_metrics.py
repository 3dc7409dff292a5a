"""The numbers of a PPO row: those of all optimiser steps together, and those that are no means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from time import perf_counter

import torch

from ftlib.batches import Mean
from ftlib.engine.engine import StepResult
from ftlib.objectives.rollout_rows import Example
from ftlib.trainers.ppo_steps import Moved

__all__ = ["derived", "speed", "summary", "tokens_of"]

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


def summary(steps: Sequence[Moved], told: Mapping[str, Mean], *, tokens: int, rate: float) -> StepResult:
    """All minibatches of an update as one step.

    Steps left out because they were not finite count only where all were.

    Args:
        steps: one or more.
        told: of the update as a whole; on the CPU.
        tokens: of its rows.
        rate: learning rate of a policy that stood still.
    """
    every = [result for step in steps for result in step.results]
    counted = [result for result in every if not result.skipped] or every
    one, last = torch.ones(()), steps[-1]
    nothing = Mean(torch.zeros(()), one)  # of a policy that stood still
    metrics: dict[str, Mean] = {
        **dict.fromkeys(("approx_kl", "clip_fraction", "ratio_deviation"), nothing),
        **_added([result.metrics for result in counted]),
        **told,
        "first_ratio_deviation": _on_cpu(counted[0].metrics.get("ratio_deviation", nothing)),
        "optimizer_steps": Mean(torch.tensor(float(len(steps))), one),
    }
    if last.critic is not None:
        metrics["grad_norm_critic"] = Mean(torch.tensor(last.critic.grad_norm), one)
    return StepResult(
        _added([result.terms for result in counted]),
        metrics,
        0.0 if last.policy is None else last.policy.grad_norm,
        tokens,
        rate if last.policy is None else last.policy.learning_rate,
        skipped=any(result.skipped for result in every),
    )


def _added(parts: Sequence[Mapping[str, Mean]]) -> dict[str, Mean]:
    """Sums by name, on the CPU."""
    sums: dict[str, Mean] = {}
    for part in parts:
        for name, mean in part.items():
            own = _on_cpu(mean)
            sums[name] = sums[name] + own if name in sums else own
    return sums


def _on_cpu(mean: Mean) -> Mean:
    return Mean(mean.sum.detach().cpu(), mean.count.detach().cpu())


def tokens_of(rows: Sequence[Example]) -> int:
    """Tokens of the rows, prompts included."""
    return sum(int(row["length"]) for row in rows)


def speed(tokens: float, started: float) -> Mean:
    """Tokens per second since `started`, a time of `perf_counter`."""
    return Mean(torch.tensor(float(tokens)), torch.tensor(perf_counter() - started))
