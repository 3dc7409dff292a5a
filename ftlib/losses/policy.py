"""PPO's losses per token: the clipped policy ratio and the clipped value error.

Shapes: B rows, L positions of a padded row. Tensors may also have any other one shape, as packed rows do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ftlib.errors import ConfigError
from ftlib.losses.masks import check_masked, masked

__all__ = ["policy_ratio", "ppo_policy", "ppo_value"]

_MAX_LOG_RATIO = 20.0  # e^20 is finite in float32, and far outside of any clip


def policy_ratio(logprobs_BL: Tensor, old_logprobs_BL: Tensor, mask_BL: Tensor) -> Tensor:
    """How much likelier a sampled token has become since it was sampled.

        rho = exp(clip(log pi - log pi_old, -20, 20))

    Args:
        logprobs_BL: log-probabilities of the sampled tokens now, float [B, L], nats.
        old_logprobs_BL: when they were sampled, same shape.
        mask_BL: bool, same shape.

    Returns:
        float32 (float64 for float64), same shape, > 0; one under mask False.

    Raises:
        ShapeError: shapes that differ, or a mask that is not bool.

    Source: Schulman et al. 2017, section 3.

    Example:
        >>> now_BL, then_BL = torch.tensor([[0.3]]).log(), torch.tensor([[0.2]]).log()
        >>> policy_ratio(now_BL, then_BL, torch.ones(1, 1, dtype=torch.bool))
        tensor([[1.5000]])
    """
    check_masked("policy_ratio", mask_BL, logprobs_BL=logprobs_BL, old_logprobs_BL=old_logprobs_BL)
    log_ratio_BL = masked(logprobs_BL, mask_BL) - masked(old_logprobs_BL, mask_BL)
    return log_ratio_BL.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()


def ppo_policy(
    logprobs_BL: Tensor,
    old_logprobs_BL: Tensor,
    advantages_BL: Tensor,
    mask_BL: Tensor,
    *,
    clip: float | tuple[float, float] = 0.2,
    dual: float | None = None,
    importance_BL: Tensor | None = None,
) -> Tensor:
    """The clipped surrogate: no gain from moving the ratio further than the clip allows.

        loss = max(-A rho, -A clip(rho, 1 - low, 1 + high)) * w
        with dual = c, where A < 0:  min(loss, -c A)

    At rho = 1 its gradient is the policy gradient, -A grad(log pi).

    Args:
        logprobs_BL: log-probabilities of the sampled tokens now, float [B, L], nats.
        old_logprobs_BL: under the policy before the update, same shape.
        advantages_BL: A, same shape, constants.
        mask_BL: bool, same shape.
        clip: one number for both sides, or (low, high); each > 0.
        dual: c > 1, bounds the loss of a bad token whose ratio has grown; None sets no bound.
        importance_BL: w, what corrects for a sampler mu that is not the old policy, same shape, such as
            `policy_ratio(old_logprobs_BL, mu_logprobs_BL, mask_BL).clamp(max=2)`; no gradient flows
            through it. None is one.

    Returns:
        float32 (float64 for float64), same shape; zero under mask False. Gradient reaches `logprobs_BL`.

    Raises:
        ShapeError: shapes that differ, or a mask that is not bool.
        ConfigError: `clip` or `dual` out of range.

    Source: Schulman et al. 2017, eq. 7; two sides: Yu et al. 2025 (DAPO), section 3.1; dual: Ye et al. 2020,
    eq. 5.

    Example:
        >>> now_BL, then_BL = torch.tensor([[0.3]]).log(), torch.tensor([[0.2]]).log()
        >>> ppo_policy(now_BL, then_BL, torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))
        tensor([[-1.2000]])
    """
    importance_BL = torch.ones_like(advantages_BL) if importance_BL is None else importance_BL
    check_masked(
        "ppo_policy",
        mask_BL,
        logprobs_BL=logprobs_BL,
        old_logprobs_BL=old_logprobs_BL,
        advantages_BL=advantages_BL,
        importance_BL=importance_BL,
    )
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    if not (low > 0 and high > 0):
        raise ConfigError(f"ppo_policy: expected clip > 0, or (low, high) with both > 0, got {clip}.")
    if dual is not None and not dual > 1:
        raise ConfigError(f"ppo_policy: expected dual > 1, or None for no bound, got {dual}.")
    ratio_BL = policy_ratio(logprobs_BL, old_logprobs_BL, mask_BL)
    advantages_BL = masked(advantages_BL, mask_BL)
    loss_BL = torch.maximum(-advantages_BL * ratio_BL, -advantages_BL * ratio_BL.clamp(1 - low, 1 + high))
    if dual is not None:
        bounded_BL = torch.minimum(loss_BL, -dual * advantages_BL)
        loss_BL = torch.where(advantages_BL < 0, bounded_BL, loss_BL)
    return loss_BL * masked(importance_BL, mask_BL).detach()


def ppo_value(
    values_BL: Tensor,
    old_values_BL: Tensor,
    returns_BL: Tensor,
    mask_BL: Tensor,
    *,
    clip: float | None = None,
) -> Tensor:
    """Half the squared error of the values, without gain from moving them further than the clip.

        loss = max((V - R)^2, (V_old + clip(V - V_old, -e, e) - R)^2) / 2

    Args:
        values_BL: V now, float [B, L].
        old_values_BL: V before the update, same shape.
        returns_BL: R, same shape, constants.
        mask_BL: bool, same shape.
        clip: e > 0, in the unit of the values; None does not clip, and then `old_values_BL` counts not.

    Returns:
        float32 (float64 for float64), same shape; zero under mask False. Gradient reaches `values_BL`.

    Raises:
        ShapeError: shapes that differ, or a mask that is not bool.
        ConfigError: a clip that is not positive.

    Source: Schulman et al. 2016, section 5; clipped as in OpenAI baselines' `ppo2`.

    Example:
        >>> old_BL, now_BL, mask_BL = torch.full((1, 1), 0.2), torch.full((1, 1), 0.9), torch.ones(1, 1) > 0
        >>> ppo_value(now_BL, old_BL, torch.ones(1, 1), mask_BL, clip=0.2)
        tensor([[0.1800]])
    """
    check_masked(
        "ppo_value", mask_BL, values_BL=values_BL, old_values_BL=old_values_BL, returns_BL=returns_BL
    )
    if clip is not None and not clip > 0:
        raise ConfigError(f"ppo_value: expected clip > 0, or None for no clip, got {clip}.")
    values_BL, returns_BL = masked(values_BL, mask_BL), masked(returns_BL, mask_BL)
    error_BL = (values_BL - returns_BL).square()
    if clip is None:
        return error_BL / 2
    old_values_BL = masked(old_values_BL, mask_BL)
    near_BL = old_values_BL + (values_BL - old_values_BL).clamp(-clip, clip)
    return torch.maximum(error_BL, (near_BL - returns_BL).square()) / 2
