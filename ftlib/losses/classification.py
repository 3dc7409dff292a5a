"""Classification losses: one number per row, before any mean.

The denominator belongs to the caller: with class weights it is the weight of the true classes,
`class_weight_of`, as in torch's own losses, and not the number of rows.

Shapes: B rows, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ftlib.errors import ConfigError, ShapeError

__all__ = ["binary_cross_entropy", "class_weight_of", "cross_entropy"]


def cross_entropy(
    logits_BK: Tensor,
    labels_B: Tensor,
    *,
    weight_K: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of each row's one class, times the class's weight.

        loss = (1 - e) w_y (-log p_y) + e / K sum_k w_k (-log p_k),   p = softmax(logits)

    The mean over rows is ``loss.sum() / class_weight_of(labels_B, weight_K).sum()``.

    Args:
        logits_BK: scores of the classes, float [B, K].
        labels_B: index of the true class, int64 [B].
        weight_K: weight of each class, float [K], > 0; None weighs all alike.
        label_smoothing: e, in [0, 1): the share of a row that is spread over all classes.

    Returns:
        float32 (float64 for float64) [B], nats.

    Raises:
        ShapeError: shapes or dtypes that do not fit.
        ConfigError: `label_smoothing` out of range.

    Source: Szegedy et al. 2016 (arXiv:1512.00567), section 7, for the smoothing.

    Example:
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2]))  # a coin of four sides costs log 4
        tensor([1.3863])
    """
    if logits_BK.ndim != 2 or labels_B.shape != logits_BK.shape[:1] or labels_B.dtype != torch.int64:
        raise ShapeError(
            f"cross_entropy: expected logits [B, K] and int64 labels [B], got {tuple(logits_BK.shape)} and "
            f"{tuple(labels_B.shape)} of {labels_B.dtype}."
        )
    _check("cross_entropy", logits_BK, weight_K, label_smoothing)
    logits_BK = _wide(logits_BK)
    weight_K = None if weight_K is None else weight_K.to(logits_BK)
    return functional.cross_entropy(
        logits_BK, labels_B, weight_K, reduction="none", label_smoothing=label_smoothing
    )


def binary_cross_entropy(
    logits_BK: Tensor,
    targets_BK: Tensor,
    *,
    weight_K: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of each row's set of classes, each class a coin of its own.

        loss = sum_k w_k (-t_k log p_k - (1 - t_k) log(1 - p_k)) / sum_k w_k,
        p = sigmoid(logits),   t = (1 - e) target + e / 2

    Args:
        logits_BK: scores of the classes, float [B, K].
        targets_BK: 1 where the row has the class, else 0, float [B, K].
        weight_K: weight of each class, float [K], > 0; None weighs all alike.
        label_smoothing: e, in [0, 1).

    Returns:
        float32 (float64 for float64) [B], nats per class.

    Raises:
        ShapeError: shapes that do not fit.
        ConfigError: `label_smoothing` out of range.

    Example:
        >>> binary_cross_entropy(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 1.0]]))
        tensor([0.6931])
    """
    if logits_BK.ndim != 2 or targets_BK.shape != logits_BK.shape:
        raise ShapeError(
            f"binary_cross_entropy: expected logits and targets [B, K], got {tuple(logits_BK.shape)} and "
            f"{tuple(targets_BK.shape)}."
        )
    _check("binary_cross_entropy", logits_BK, weight_K, label_smoothing)
    logits_BK = _wide(logits_BK)
    targets_BK = targets_BK.to(logits_BK) * (1 - label_smoothing) + label_smoothing / 2
    losses_BK = functional.binary_cross_entropy_with_logits(logits_BK, targets_BK, reduction="none")
    if weight_K is None:
        return losses_BK.mean(-1)
    weight_K = weight_K.to(logits_BK)
    return losses_BK @ (weight_K / weight_K.sum())


def class_weight_of(labels_B: Tensor, weight_K: Tensor | None = None) -> Tensor:
    """The weight of each row's true class, what `cross_entropy` counts: float32 [B], ones without weights.

    Example:
        >>> class_weight_of(torch.tensor([0, 1, 1]), torch.tensor([3.0, 0.5]))
        tensor([3.0000, 0.5000, 0.5000])
    """
    if weight_K is None:
        return torch.ones(labels_B.shape, device=labels_B.device)
    return weight_K.to(labels_B.device, torch.float32)[labels_B]


def _wide(logits_BK: Tensor) -> Tensor:
    return logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32))


def _check(name: str, logits_BK: Tensor, weight_K: Tensor | None, label_smoothing: float) -> None:
    if weight_K is not None and weight_K.shape != logits_BK.shape[1:]:
        raise ShapeError(
            f"{name}: expected one weight per class [{logits_BK.shape[1]}], got {tuple(weight_K.shape)}."
        )
    if not 0.0 <= label_smoothing < 1.0:
        raise ConfigError(f"{name}: expected label_smoothing in [0, 1), got {label_smoothing}.")
