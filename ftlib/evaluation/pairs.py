"""How well scores order answers: what is said of a reward model beside its loss.

Every pair of answers of one group, of which one ranks above the other, is one observation. A group counts
as much as any other, however many pairs it holds.

Shapes: P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ftlib.errors import DataError

__all__ = ["ScoredAnswers", "as_answers", "pair_metrics", "roc_points"]

BINS = 10  # of the calibration error
Floats = NDArray[np.float64]


@final
@dataclass(frozen=True)
class ScoredAnswers:
    """The answers to one prompt and what a model gives them.

    Args:
        scores: one per answer, in units of the reward.
        lengths: tokens of each answer.
        ranks: 1.0 is the best; equal ranks are ties.
        source: which data set the row came from; metrics are also given per source.
    """

    scores: Sequence[float]
    lengths: Sequence[int]
    ranks: Sequence[float]
    source: str = ""


@final
@dataclass(frozen=True, eq=False)
class _Pairs:
    better_P: Floats
    worse_P: Floats
    longer_P: Floats  # tokens of the better answer minus those of the worse one
    weight_P: Floats

    def mean(self, values_P: Floats) -> float:
        return float(np.average(values_P, weights=self.weight_P)) if self.weight_P.sum() else nan


def pair_metrics(groups: Sequence[ScoredAnswers]) -> dict[str, float]:
    """Numbers that say how well scores order answers; also under ``<source>/`` where there are several.

    | name | meaning |
    |---|---|
    | accuracy | share of pairs whose better answer scores higher; a tie counts one half |
    | tie_rate | share of pairs with equal scores |
    | margin | mean lead of the better answer |
    | log_loss | mean of ``-log sigmoid(lead)``, nats |
    | calibration_error | expected gap between ``sigmoid(abs(lead))`` and the share that is right, 10 bins |
    | reward_mean, reward_std, reward_min, reward_max | of all answers |
    | length_correlation | Spearman's, of score and tokens, over all answers |
    | longer_wins_accuracy | accuracy of a rule that prefers the longer answer |

    Args:
        groups: at least one, with a pair in at least one of them.

    Raises:
        DataError: no pair to order.

    Source: the calibration error is that of Guo et al. 2017 (arXiv:1706.04599), eq. 5, on the confidence
    of the preferred side.

    Example:
        >>> right = ScoredAnswers([2.0, 0.0], lengths=[5, 3], ranks=[1.0, 2.0])
        >>> wrong = ScoredAnswers([0.0, 1.0], lengths=[2, 4], ranks=[1.0, 2.0])
        >>> pair_metrics([right, wrong])["accuracy"]
        0.5
    """
    sources = sorted({group.source for group in groups})
    metrics = _of(groups)
    if len(sources) > 1:
        for source in sources:
            members = [group for group in groups if group.source == source]
            metrics |= {f"{source}/{name}": value for name, value in _of(members).items()}
    return metrics


def roc_points(groups: Sequence[ScoredAnswers]) -> tuple[Floats, Floats]:
    """Labels (1 better, 0 worse) and scores of both answers of every pair, for an ROC curve [2P]."""
    pairs = _pairs(groups)
    labels = np.concatenate([np.ones(len(pairs.better_P)), np.zeros(len(pairs.worse_P))])
    return labels, np.concatenate([pairs.better_P, pairs.worse_P])


def _of(groups: Sequence[ScoredAnswers]) -> dict[str, float]:
    pairs = _pairs(groups)
    lead_P = pairs.better_P - pairs.worse_P
    scores = np.concatenate([np.asarray(group.scores, float) for group in groups])
    lengths = np.concatenate([np.asarray(group.lengths, float) for group in groups])
    return {
        "accuracy": pairs.mean(_wins(lead_P)),
        "tie_rate": pairs.mean((lead_P == 0).astype(float)),
        "margin": pairs.mean(lead_P),
        "log_loss": pairs.mean(np.logaddexp(0.0, -lead_P)),
        "calibration_error": _calibration_error(lead_P, pairs.weight_P),
        "reward_mean": float(scores.mean()),
        "reward_std": float(scores.std()),
        "reward_min": float(scores.min()),
        "reward_max": float(scores.max()),
        "length_correlation": _rank_correlation(scores, lengths),
        "longer_wins_accuracy": pairs.mean(_wins(pairs.longer_P)),
    }


def _pairs(groups: Sequence[ScoredAnswers]) -> _Pairs:
    rows: list[tuple[float, float, float, float]] = []
    for group in groups:
        answers = list(zip(group.ranks, group.scores, group.lengths, strict=True))
        found = [
            (better[1], worse[1], float(better[2] - worse[2]))
            for better in answers
            for worse in answers
            if better[0] < worse[0]
        ]
        rows += [(*pair, 1 / len(found)) for pair in found]
    if not rows:
        raise DataError(
            "pair_metrics: expected answers of which one ranks above another, got none. "
            "Give groups of two answers or more with different ranks.",
            code="empty_data",
        )
    return _Pairs(*np.asarray(rows, float).T)


def _wins(lead_P: Floats) -> Floats:
    """1 where the better answer leads, 0 where it trails, one half where they tie."""
    return (np.sign(lead_P) + 1) / 2


def _calibration_error(lead_P: Floats, weight_P: Floats) -> float:
    confidence_P = 1 / (1 + np.exp(-np.abs(lead_P)))  # from 0.5 to 1
    bin_P = np.clip(((confidence_P - 0.5) * 2 * BINS).astype(int), 0, BINS - 1)
    share = [np.bincount(bin_P, weights=weight_P * x, minlength=BINS) for x in (confidence_P, _wins(lead_P))]
    return float(np.abs(share[0] - share[1]).sum() / weight_P.sum())


def _rank_correlation(x: Floats, y: Floats) -> float:
    """Spearman's; NaN where one side does not vary."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return nan
    return float(pd.DataFrame({"x": x, "y": y}).corr(method="spearman").to_numpy()[0, 1])


def as_answers(row: Mapping[str, Any], scores: Sequence[float]) -> ScoredAnswers:
    """Scores of an encoded row, with its ranks (by default the order of its answers) and lengths."""
    lengths = [len(ids) for ids in row["continuation_ids"]]
    ranks = row.get("rank") or [float(number + 1) for number in range(len(lengths))]
    return ScoredAnswers(scores, lengths, ranks, str(row.get("source", "")).rpartition(":")[0])
