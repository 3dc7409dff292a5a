"""Perplexity: how many equally likely tokens the model hesitates between."""

from __future__ import annotations

import math

__all__ = ["perplexity"]


def perplexity(mean_nll: float) -> float:
    """Exponential of the mean negative log-likelihood.

        perplexity = exp(mean nll)

    Args:
        mean_nll: nats per token.

    Returns:
        At least 1 for a true likelihood; infinity past the largest float (about 709.78 nats), nan for nan.

    Example:
        >>> round(perplexity(math.log(50)), 6)  # as unsure as between 50 equal choices
        50.0
    """
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
