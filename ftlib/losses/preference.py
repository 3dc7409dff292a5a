"""Preference losses: one number per pair of a chosen and a rejected completion.

`bradley_terry` takes scores of a reward model. The others take log-probabilities of whole completions
under the policy and a reference, have one signature, and see nothing of them but

    h = (chosen - ref_chosen) - (rejected - ref_rejected),   z = beta * h

A loss that wants means per token instead of sums says so by an attribute ``reduction = "mean"``.

Left out: losses of more than two completions; a ranking is the mean over its pairs.

Shapes: B pairs.
"""

from __future__ import annotations

import math
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from ftlib.errors import ConfigError, ShapeError

__all__ = ["bradley_terry", "dpo", "hinge", "ipo", "robust_dpo"]


def bradley_terry(
    chosen_B: Tensor,
    rejected_B: Tensor,
    *,
    margin_B: Tensor | None = None,
    center: float = 0.0,
    label_B: Tensor | None = None,
) -> Tensor:
    """Negative log-likelihood that the chosen completion leads by its margin.

        loss = -p log sigmoid(d) - (1 - p) log sigmoid(-d) + center * (chosen + rejected)^2

    with d = chosen - rejected - margin, and p = 1 unless a soft label says less.

    Args:
        chosen_B: scores of the chosen completions, float [B], any unit.
        rejected_B: scores of the rejected completions, float [B], same unit.
        margin_B: lead asked for, float [B], same unit; None asks for none.
        center: weight of the pull towards scores that sum to zero, >= 0. The first part leaves the
            level of the scores free.
        label_B: p, the probability that the chosen one is the better, float [B], in [0, 1]; None is one.

    Returns:
        float32 (float64 for float64) [B], nats; gradient reaches both scores.

    Raises:
        ShapeError: not vectors of one length.
        ConfigError: a negative or infinite `center`.

    Source: Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023 (Llama 2), eq. 2; centring: Eisenstein
    et al. 2023, eq. 2.

    Example:
        >>> bradley_terry(torch.tensor([1.0]), torch.tensor([0.0]))
        tensor([0.3133])
    """
    if not 0.0 <= center < math.inf:
        raise ConfigError(f"bradley_terry: expected a finite center >= 0, got {center}.")
    margin_B = torch.zeros_like(chosen_B) if margin_B is None else margin_B
    chosen_B, rejected_B, margin_B = _vectors("bradley_terry", chosen_B, rejected_B, margin_B)
    lead_B = chosen_B - rejected_B - margin_B
    loss_B = -logsigmoid(lead_B) + center * (chosen_B + rejected_B).square()
    if label_B is None:
        return loss_B
    lead_B, label_B = _vectors("bradley_terry", lead_B, label_B)
    return loss_B + (1 - label_B) * lead_B  # -(1 - p) log sigmoid(-d) = (1 - p) (d - log sigmoid(d))


def dpo(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of the preference under the policy's implicit reward.

        loss = -(1 - e) log sigmoid(z) - e log sigmoid(-z)

    With a label smoothing e above zero this is conservative DPO: a pair is taken to be swapped with
    probability e, and z stops at log((1 - e) / e).

    Args:
        chosen_B: log-probabilities of the chosen completions under the policy, float [B], nats.
        rejected_B: of the rejected completions.
        ref_chosen_B: of the chosen completions under the reference.
        ref_rejected_B: of the rejected completions under the reference.
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: e, in [0, 0.5).

    Returns:
        float32 (float64 for float64) [B], nats; gradient reaches all four.

    Raises:
        ShapeError: not vectors of one length.
        ConfigError: `beta` or `label_smoothing` out of range.

    Source: Rafailov et al. 2023, eq. 7; conservative: Mitchell 2023, "A note on DPO with noisy
    preferences".

    Example:
        >>> tie = torch.zeros(1)
        >>> dpo(torch.ones(1), tie, tie, tie, beta=0.1)
        tensor([0.6444])
    """
    _check_noise("dpo", label_smoothing)
    z_B = beta * _log_ratio("dpo", chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta)
    return -(1 - label_smoothing) * logsigmoid(z_B) - label_smoothing * logsigmoid(-z_B)


def robust_dpo(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`dpo`, unbiased where pairs are swapped with probability e.

        loss = (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2e)

    Its mean over the swap, (1 - e) loss(h) + e loss(-h), is the loss of `dpo` without noise. Single
    values may be negative.

    Args and errors: as in `dpo`; `label_smoothing` is e.

    Source: Ray Chowdhury et al. 2024, "Provably robust DPO".

    Example:
        >>> tie = torch.zeros(1)
        >>> robust_dpo(torch.ones(1), tie, tie, tie, beta=0.1, label_smoothing=0.1)
        tensor([0.6319])
    """
    _check_noise("robust_dpo", label_smoothing)
    z_B = beta * _log_ratio("robust_dpo", chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta)
    kept, swapped = 1 - label_smoothing, label_smoothing
    return (swapped * logsigmoid(-z_B) - kept * logsigmoid(z_B)) / (kept - swapped)


def hinge(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """A lead of one in the implicit reward is enough.

        loss = max(0, 1 - z)

    Args and errors: as in `dpo`; a nonzero `label_smoothing` has no meaning here and is a ConfigError.

    Source: Zhao et al. 2023 (SLiC), with the log-ratio in place of the log-probability.

    Example:
        >>> tie = torch.zeros(1)
        >>> hinge(torch.ones(1), tie, tie, tie, beta=0.1)
        tensor([0.9000])
    """
    _refuse_noise("hinge", label_smoothing)
    h_B = _log_ratio("hinge", chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta)
    return relu(1 - beta * h_B)


def ipo(
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Squared distance of the log-ratio from its target: certain preferences do not send it to infinity.

        loss = (h - 1 / (2 beta))^2

    Its ``reduction`` is "mean": callers give log-probabilities averaged per token on each side, so that
    one target suits completions of any length.

    Args and errors: as in `dpo`; a nonzero `label_smoothing` has no meaning here and is a ConfigError.

    Source: Azar et al. 2023, eq. 17.

    Example:
        >>> tie = torch.zeros(1)
        >>> ipo(torch.ones(1), tie, tie, tie, beta=0.1)
        tensor([16.])
    """
    _refuse_noise("ipo", label_smoothing)
    h_B = _log_ratio("ipo", chosen_B, rejected_B, ref_chosen_B, ref_rejected_B, beta)
    return (h_B - 1 / (2 * beta)).square()


ipo.__dict__["reduction"] = "mean"


def _log_ratio(
    name: str,
    chosen_B: Tensor,
    rejected_B: Tensor,
    ref_chosen_B: Tensor,
    ref_rejected_B: Tensor,
    beta: float,
) -> Tensor:
    """h, in at least float32, once shapes and beta are known to be good."""
    if not 0.0 < beta < math.inf:
        raise ConfigError(f"{name}: expected a finite beta > 0, got {beta}.")
    chosen_B, rejected_B, ref_chosen_B, ref_rejected_B = _vectors(
        name, chosen_B, rejected_B, ref_chosen_B, ref_rejected_B
    )
    return (chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B)


def _vectors(name: str, *tensors: Tensor) -> list[Tensor]:
    """The vectors in one dtype, at least float32."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(shapes[0]) != 1 or len(set(shapes)) > 1:
        raise ShapeError(
            f"{name}: expected vectors of one length [B], got {shapes}. Give one number per pair."
        )
    wide = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return [tensor.to(wide) for tensor in tensors]


def _check_noise(name: str, label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 0.5:
        raise ConfigError(
            f"{name}: expected a label_smoothing in [0, 0.5), got {label_smoothing}. It is the share of "
            "pairs taken to be swapped; from one half on they say nothing."
        )


def _refuse_noise(name: str, label_smoothing: float) -> None:
    _check_noise(name, label_smoothing)
    if label_smoothing:
        raise ConfigError(
            f"{name}: expected label_smoothing=0, got {label_smoothing}. Use dpo or robust_dpo for noisy "
            "labels."
        )
