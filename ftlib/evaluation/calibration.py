"""A temperature that makes a classifier as sure as it is right.

    probabilities = softmax(scores / T), or sigmoid(scores / T) where a row may have several classes

The class that is likeliest stays so. T minimises the log-loss on rows that were held out; the log-loss is
convex in 1 / T, so it is found where its derivative changes sign.

Source: Guo et al. 2017 (arXiv:1706.04599), section 4.2.

Shapes: B rows, K classes.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ftlib.errors import ShapeError

__all__ = ["fit_temperature", "probabilities"]

logger = logging.getLogger(__name__)
_LEAST, _MOST = 0.05, 20.0
_HALVINGS = 80
Floats = NDArray[np.float64]


def probabilities(scores_BK: Floats, *, several: bool = False, temperature: float = 1.0) -> Floats:
    """Of each class, [B, K].

    Example:
        >>> probabilities(np.array([[np.log(3.0), 0.0]])).round(2)
        array([[0.75, 0.25]])
    """
    z_BK = np.asarray(scores_BK, np.float64) / temperature
    if several:
        return np.exp(-np.logaddexp(0.0, -z_BK))
    z_BK = z_BK - z_BK.max(-1, keepdims=True)
    grown_BK = np.exp(z_BK)
    shares_BK: Floats = grown_BK / grown_BK.sum(-1, keepdims=True)
    return shares_BK


def fit_temperature(scores_BK: Floats, truth_BK: NDArray[Any], *, several: bool = False) -> float:
    """The temperature of least log-loss, between 1/20 and 20.

    Args:
        scores_BK: of a classifier, float [B, K].
        truth_BK: 1 where the row has the class, else 0.
        several: a row may have any set of classes.

    Raises:
        ShapeError: shapes that do not fit, or no rows.
    """
    scores_BK, truth_BK = np.asarray(scores_BK, np.float64), np.asarray(truth_BK, np.float64)
    if scores_BK.ndim != 2 or scores_BK.shape != truth_BK.shape or not len(scores_BK):
        raise ShapeError(
            f"fit_temperature: expected scores and truth [B, K] of at least one row, got {scores_BK.shape} "
            f"and {truth_BK.shape}."
        )

    def slope(temperature: float) -> float:
        """Of the log-loss in 1 / T: mean over rows of the scores expected less those of the truth."""
        p_BK = probabilities(scores_BK, several=several, temperature=temperature)
        return float(((p_BK - truth_BK) * scores_BK).sum(-1).mean())

    low, high = _LEAST, _MOST
    if slope(low) <= 0 or slope(high) >= 0:
        found = low if slope(low) <= 0 else high
        logger.warning(
            "calibrate: the log-loss is least at an extreme temperature, %g is taken: the rows are %s. "
            "Give more rows that were not trained on.",
            found,
            "all right" if found == low else "no better than chance",
        )
        return found
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if slope(middle) < 0 else (middle, high)
    return float((low * high) ** 0.5)
