"""Likelihood: log-probabilities of tokens, their negative, and entropy. One number per row.

Shapes: N scored rows, T rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ftlib.errors import ConfigError, ShapeError

__all__ = ["entropy", "nll", "token_logprobs"]


def nll(logprobs_N: Tensor) -> Tensor:
    """Negative log-likelihood per token.

        loss = -logp

    Args:
        logprobs_N: log-probabilities in nats, float [N], <= 0.

    Returns:
        float32 (float64 for float64) [N], nats, >= 0.

    Raises:
        ShapeError: not a vector.

    Example:
        >>> nll(torch.tensor([0.5, 0.25]).log())
        tensor([0.6931, 1.3863])
    """
    if logprobs_N.ndim != 1:
        raise ShapeError(
            f"nll: expected log-probabilities [N], got {tuple(logprobs_N.shape)}. Flatten the rows."
        )
    return -logprobs_N.to(torch.promote_types(logprobs_N.dtype, torch.float32))


def token_logprobs(logits_TV: Tensor, targets_T: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target under a softmax of its row.

        logp_t = z_t[y_t] - logsumexp(z_t),   z = logits / temperature

    The plain version of the head that `models.forward` uses; its oracle in the tests.

    Args:
        logits_TV: float [T, V], any dtype; computed in at least float32.
        targets_T: int64 [T], below V.
        temperature: > 0.

    Returns:
        float32 (float64 for float64) [T], nats.

    Raises:
        ShapeError: ranks or lengths that do not fit.
        ConfigError: a temperature that is not positive.

    Example:
        >>> token_logprobs(torch.zeros(1, 4), torch.tensor([2])).exp()
        tensor([0.2500])
    """
    if logits_TV.ndim != 2 or targets_T.shape != logits_TV.shape[:1]:
        raise ShapeError(
            f"token_logprobs: expected logits [T, V] and targets [T], got {tuple(logits_TV.shape)} and "
            f"{tuple(targets_T.shape)}."
        )
    if not temperature > 0:
        raise ConfigError(f"token_logprobs: expected a temperature > 0, got {temperature}.")
    return _log_softmax(logits_TV, temperature).gather(1, targets_T[:, None])[:, 0]


def entropy(logits_TV: Tensor) -> Tensor:
    """Entropy of the softmax of each row.

        H_t = -sum_v p_tv log p_tv

    Args:
        logits_TV: float [T, V], any dtype; -inf means impossible. Computed in at least float32.

    Returns:
        float32 (float64 for float64) [T], nats, between 0 and log V.

    Raises:
        ShapeError: not a matrix.

    Example:
        >>> entropy(torch.zeros(1, 4))  # uniform over four: log 4
        tensor([1.3863])
    """
    if logits_TV.ndim != 2:
        raise ShapeError(f"entropy: expected logits [T, V], got {tuple(logits_TV.shape)}.")
    logprobs_TV = _log_softmax(logits_TV, 1.0)
    return -(logprobs_TV.exp() * logprobs_TV.clamp(min=torch.finfo(logprobs_TV.dtype).min)).sum(-1)


def _log_softmax(logits_TV: Tensor, temperature: float) -> Tensor:
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    return (logits_TV.to(wide) / temperature).log_softmax(-1)
