"""Means and variances under a mask, over all ranks: whitening, explained variance, running moments.

Each function that needs the numbers of other ranks takes `reduce`, a function that adds a float vector
over the ranks (an all-reduce) and is called the same number of times on every rank, whatever its rows
hold. Without it, what is given is all there is.

Shapes: B rows, L positions of a padded row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from ftlib.errors import NonFiniteError
from ftlib.losses.masks import check_masked, masked, wide

__all__ = ["RunningMoments", "explained_variance", "whiten"]

Reduce = Callable[[Tensor], Tensor]
_EPS = 1e-8  # under the root, so that equal values whiten to zero
_ROUNDING = 2e-6  # a deviation below this share of the mean is the rounding of equal float32 values


def whiten(
    x_BL: Tensor,
    mask_BL: Tensor,
    *,
    center: bool = True,
    unbiased: bool = True,
    reduce: Reduce | None = None,
) -> Tensor:
    """Values scaled to variance one, and shifted to mean zero unless the mean is to stay.

        y = (x - mean) / sqrt(var + 1e-8)   (+ mean, with center=False)

    Args:
        x_BL: float [B, L], or any one shape.
        mask_BL: bool, same shape; mean and variance are over True only.
        center: whether the mean goes. Keeping it matters for rewards, whose level says how good an
            ending is; advantages have none to keep.
        unbiased: variance over n - 1 instead of n.
        reduce: adds a float vector over the ranks; called twice.

    Returns:
        float32 (float64 for float64), same shape, zero under mask False. With fewer than two values over
        all ranks they are unchanged.

    Raises:
        ShapeError: shapes that differ, or a mask that is not bool.

    Source: Huang et al. 2024, "The N+ implementation details of RLHF with PPO"; the constant is that of
    Ziegler et al. 2019's code.

    Example:
        >>> whiten(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(1, 4, dtype=torch.bool))
        tensor([[-1.1619, -0.3873,  0.3873,  1.1619]])
    """
    check_masked("whiten", mask_BL, x_BL=x_BL)
    count, mean, squares = _moments(x_BL, mask_BL, reduce)
    variance = squares / (count - int(unbiased)).clamp(min=1)
    kept_BL = masked(x_BL, mask_BL)
    white_BL = (kept_BL - mean) / (variance + _EPS).sqrt() + (0.0 if center else mean)
    return masked(torch.where(count < 2, kept_BL, white_BL), mask_BL)


def explained_variance(
    values_BL: Tensor, returns_BL: Tensor, mask_BL: Tensor, *, reduce: Reduce | None = None
) -> Tensor:
    """How much of the returns' variance the values account for.

        EV = 1 - Var(R - V) / Var(R)

    Args:
        values_BL: predicted, float [B, L], or any one shape.
        returns_BL: what `gae` made of them, same shape and unit.
        mask_BL: bool, same shape.
        reduce: adds a float vector over the ranks; called four times.

    Returns:
        float32 (float64 for float64) scalar, at most 1; below 0 is worse than a constant. Zero where all
        returns are equal.

    Raises:
        ShapeError: shapes that differ, or a mask that is not bool.

    Example:
        >>> returns_BL, mask_BL = torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool)
        >>> explained_variance(returns_BL / 2, returns_BL, mask_BL)
        tensor(0.7500)
    """
    check_masked("explained_variance", mask_BL, values_BL=values_BL, returns_BL=returns_BL)
    *_, residual = _moments(masked(returns_BL, mask_BL) - masked(values_BL, mask_BL), mask_BL, reduce)
    count, mean, total = _moments(returns_BL, mask_BL, reduce)
    vary = total > count * (_ROUNDING * mean).square()
    return torch.where(vary, 1 - residual / torch.where(vary, total, torch.ones_like(total)), 0.0)


@final
@dataclass(eq=False)
class RunningMoments:
    """Mean and variance of everything seen so far, without keeping it; to scale scores by.

    Scores are divided by the running deviation only. Their mean stays: taking it off would shift what
    stopping is worth against going on.

    Args:
        count: values seen.
        mean: of them.
        squares: sum of their squared distances from the mean.

    Source: Chan, Golub & LeVeque 1979, whose formula merges one batch after the other.

    Example:
        >>> moments = RunningMoments()
        >>> moments.update(torch.tensor([1.0, 3.0]))
        >>> moments.update(torch.tensor([5.0]))
        >>> moments.mean, moments.std
        (3.0, 2.0)
        >>> moments.scale(torch.tensor([4.0]))
        tensor([2.])
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Unbiased standard deviation; zero below two values, and where all are equal up to rounding."""
        std = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return std if std > _ROUNDING * abs(self.mean) else 0.0

    def update(self, x: Tensor, mask: Tensor | None = None, *, reduce: Reduce | None = None) -> None:
        """Take in a batch, once per rollout: its numbers are read from the device.

        Args:
            x: float of any shape, such as the scores of a rollout.
            mask: bool, same shape; None counts everything.
            reduce: adds a float vector over the ranks, so that all hold the same moments; called twice.

        Raises:
            ShapeError: shapes that differ, or a mask that is not bool.
            NonFiniteError: a NaN or infinite value that counts; the moments were not touched.
        """
        mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        check_masked("RunningMoments.update", mask, x=x)
        count, mean, squares = torch.stack(_moments(x.detach(), mask, reduce)).tolist()
        if not math.isfinite(mean + squares):
            raise NonFiniteError(
                f"RunningMoments.update: expected finite values, got a mean of {mean}. Look at the scores."
            )
        total = self.count + count
        if total > 0:
            step = mean - self.mean
            self.mean += step * count / total
            self.squares += squares + step * step * self.count * count / total
        self.count = total

    def scale(self, x: Tensor) -> Tensor:
        """`x` over the deviation, in at least float32; unchanged until two different values were seen."""
        return wide(x) / (self.std or 1.0)

    def state_dict(self) -> dict[str, Any]:
        """The three numbers."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Continue from the numbers of `state_dict`."""
        self.count, self.mean = float(state["count"]), float(state["mean"])
        self.squares = float(state["squares"])


def _moments(x: Tensor, mask: Tensor, reduce: Reduce | None) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean, and sum of squared distances from that mean, over all ranks.

    Two passes: the mean of the squares minus the square of the mean would cancel in float32.
    """
    reduce = _alone if reduce is None else reduce
    kept = masked(x, mask)
    count, total = reduce(torch.stack((mask.sum().to(kept.dtype), kept.sum())))
    mean = total / count.clamp(min=1)
    (squares,) = reduce(masked(kept - mean, mask).square().sum()[None])
    return count, mean, squares


def _alone(sums: Tensor) -> Tensor:
    return sums
