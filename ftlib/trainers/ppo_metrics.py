"""Numbers of a PPO row that are no means, from the means they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["derived"]

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
