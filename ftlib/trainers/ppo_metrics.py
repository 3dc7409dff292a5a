"""The numbers of a PPO row: those of all optimiser steps together, and those that are no means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from ftlib.batches import Mean
from ftlib.engine.engine import StepResult
from ftlib.objectives.ppo import Prepared
from ftlib.trainers.ppo_given import mean_reward
from ftlib.trainers.ppo_health import agreement_of
from ftlib.trainers.ppo_phase import Phase

__all__ = ["derived", "speed", "summary"]

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


def summary(phase: Phase, prepared: Prepared, *, beta: float, rate: float) -> StepResult:
    """All minibatches of an update as one step, with what is told of the update as a whole.

    Steps left out because they were not finite count only where all were.

    Args:
        phase: at its end.
        prepared: what it trained on.
        beta: strength of its penalty.
        rate: learning rate of a policy that stood still.
    """
    every = [result for moved in phase.moved for result in moved.results]
    counted = [result for result in every if not result.skipped] or every
    one, last = torch.ones(()), phase.moved[-1]
    nothing = Mean(torch.zeros(()), one)  # of a policy that stood still
    tokens = sum(int(row["length"]) for row in prepared.rows)  # prompts included
    metrics: dict[str, Mean] = {
        **dict.fromkeys(("approx_kl", "clip_fraction", "ratio_deviation"), nothing),
        **_added([result.metrics for result in counted]),
        **phase.told,
        **prepared.metrics,
        "reward": mean_reward(phase.rollouts),
        **agreement_of(phase.rollouts),
        "update_tokens_per_second": speed(tokens, phase.seconds),
        "beta": Mean(torch.tensor(beta), one),
        "first_ratio_deviation": _on_cpu(counted[0].metrics.get("ratio_deviation", nothing)),
        "optimizer_steps": Mean(torch.tensor(float(len(phase.moved))), one),
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


def speed(tokens: float, seconds: float) -> Mean:
    """Tokens per second."""
    return Mean(torch.tensor(float(tokens)), torch.tensor(seconds))
