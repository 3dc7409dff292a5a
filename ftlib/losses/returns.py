"""From scores to advantages: rewards per token, and generalised advantage estimation.

A *hole* is a token of the completion under mask False that the policy did not sample, such as a tool's
output. Time does not pass in a hole: the result at the sampled tokens is that of the row without it.

These are targets: no gradient flows through `gae`.

Shapes: B rows, L positions of a padded row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ftlib.errors import ConfigError, ShapeError
from ftlib.losses.masks import check_masked, masked

__all__ = ["gae", "shape_rewards"]


def shape_rewards(
    scores_B: Tensor,
    log_ratio_BL: Tensor,
    mask_BL: Tensor,
    *,
    beta: float,
    token_rewards_BL: Tensor | None = None,
) -> Tensor:
    """Rewards per token: the KL penalty everywhere, the score once at the last sampled token.

        r_t = -beta l_t + u_t   (+ score at the last t with m_t = 1)

    Args:
        scores_B: one score per completion, float [B]; zeros where all is in the token rewards. The score
            of a row of which nothing counts goes nowhere.
        log_ratio_BL: l = log pi(a) - log ref(a) at the sampling temperature, float [B, L], nats.
        mask_BL: bool [B, L], True where the policy sampled the token, its terminator included.
        beta: strength of the KL penalty, >= 0; score units per nat.
        token_rewards_BL: u, float [B, L], score units; None for none.

    Returns:
        float32 (float64 for float64) [B, L], score units; zero under mask False.

    Raises:
        ShapeError: shapes that do not fit, or a mask that is not bool.
        ConfigError: a negative or NaN `beta`.

    Source: Ouyang et al. 2022 (InstructGPT), eq. 2, token by token as in Ziegler et al. 2019.

    Example:
        >>> log_ratio_BL = torch.tensor([[0.5, -0.2, 0.1]])
        >>> shape_rewards(torch.ones(1), log_ratio_BL, torch.ones(1, 3, dtype=torch.bool), beta=0.1)
        tensor([[-0.0500,  0.0200,  0.9900]])
    """
    token_rewards_BL = torch.zeros_like(log_ratio_BL) if token_rewards_BL is None else token_rewards_BL
    check_masked(
        "shape_rewards", mask_BL, matrix=True, log_ratio_BL=log_ratio_BL, token_rewards_BL=token_rewards_BL
    )
    _check_rows("shape_rewards", "scores_B", scores_B, mask_BL)
    if not beta >= 0:
        raise ConfigError(f"shape_rewards: expected beta >= 0, got {beta}.")
    after_BL = mask_BL.long().flip(1).cumsum(1).flip(1)  # sampled tokens from here on
    last_BL = mask_BL & (after_BL == 1)
    scores_BL = masked(scores_B[:, None].expand_as(log_ratio_BL), last_BL)
    return scores_BL + masked(token_rewards_BL, mask_BL) - beta * masked(log_ratio_BL, mask_BL)


@torch.no_grad()
def gae(
    rewards_BL: Tensor,
    values_BL: Tensor,
    mask_BL: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_B: Tensor | None = None,
    lam_value: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of the sampled tokens, with t+ the next *sampled* token after t.

        delta_t = r_t + gamma V_t+ - V_t
        A_t     = delta_t + gamma lam A_t+
        R_t     = A_t + V_t,   with lam_value in place of lam where it is given

    After the last sampled token A = 0 and V is `bootstrap_B`.

    Args:
        rewards_BL: as `shape_rewards` gives, float [B, L].
        values_BL: V_t of the state *before* token t, float [B, L], same unit.
        mask_BL: bool [B, L], True where the policy sampled the token.
        gamma: discount per sampled token, in [0, 1].
        lam: decay of the policy's advantages, in [0, 1]; 1 is return minus value, 0 one step ahead.
        bootstrap_B: value of the state after the last sampled token, float [B]: zero for rows that
            ended by themselves, and for the others what a cut is to count as. None is zero for all.
        lam_value: the critic's own decay, in [0, 1]; None is `lam`. 1 suits long rows with one score.

    Returns:
        advantages and returns, float32 (float64 for float64) [B, L], not whitened; zero under mask
        False. No gradient flows through them.

    Raises:
        ShapeError: shapes that do not fit, or a mask that is not bool.
        ConfigError: a discount or decay outside [0, 1].

    Source: Schulman et al. 2016, eq. 16; two decays: Yuan et al. 2025 (VC-PPO), "decoupled GAE".

    Example:
        >>> rewards_BL, values_BL = torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.2)
        >>> gae(rewards_BL, values_BL, torch.ones(1, 3, dtype=torch.bool))[0]
        tensor([[0.7220, 0.7600, 0.8000]])
    """
    check_masked("gae", mask_BL, matrix=True, rewards_BL=rewards_BL, values_BL=values_BL)
    bootstrap_B = values_BL.new_zeros(len(values_BL)) if bootstrap_B is None else bootstrap_B
    _check_rows("gae", "bootstrap_B", bootstrap_B, mask_BL)
    lam_value = lam if lam_value is None else lam_value
    for name, share in (("gamma", gamma), ("lam", lam), ("lam_value", lam_value)):
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"gae: expected {name} in [0, 1], got {share}.")
    rewards_BL, values_BL = masked(rewards_BL, mask_BL), masked(values_BL, mask_BL)
    deltas_BL = _deltas(rewards_BL, values_BL, mask_BL, gamma, bootstrap_B)
    advantages_BL = _decayed(deltas_BL, mask_BL, gamma * lam)
    if lam_value == lam:
        return advantages_BL, masked(advantages_BL + values_BL, mask_BL)
    return advantages_BL, masked(_decayed(deltas_BL, mask_BL, gamma * lam_value) + values_BL, mask_BL)


def _deltas(
    rewards_BL: Tensor, values_BL: Tensor, mask_BL: Tensor, gamma: float, bootstrap_B: Tensor
) -> Tensor:
    """One-step errors, r + gamma V+ - V, where V+ is carried over what was not sampled."""
    following_BL = torch.empty_like(values_BL)
    carried_B = bootstrap_B.to(values_BL.dtype)
    for t in reversed(range(mask_BL.shape[1])):
        following_BL[:, t] = carried_B
        carried_B = torch.where(mask_BL[:, t], values_BL[:, t], carried_B)
    return masked(rewards_BL + gamma * following_BL - values_BL, mask_BL)


def _decayed(deltas_BL: Tensor, mask_BL: Tensor, decay: float) -> Tensor:
    """The sum of all that follows, each further sampled token weighing `decay` less."""
    sums_BL = torch.empty_like(deltas_BL)
    carried_B = deltas_BL.new_zeros(len(deltas_BL))
    for t in reversed(range(mask_BL.shape[1])):
        carried_B = torch.where(mask_BL[:, t], deltas_BL[:, t] + decay * carried_B, carried_B)
        sums_BL[:, t] = carried_B
    return masked(sums_BL, mask_BL)


def _check_rows(where: str, name: str, rows_B: Tensor, mask_BL: Tensor) -> None:
    if rows_B.shape != mask_BL.shape[:1]:
        raise ShapeError(
            f"{where}: expected {name} of shape ({len(mask_BL)},), one per row of the mask, got "
            f"{tuple(rows_B.shape)}."
        )
