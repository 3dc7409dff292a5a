"""What is said of scores that order answers, against numbers worked out by hand and scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from ftlib.errors import DataError
from ftlib.evaluation.pairs import ScoredAnswers, as_answers, pair_metrics, roc_points


def pair(
    chosen: float, rejected: float, *, lengths: tuple[int, int] = (4, 2), source: str = ""
) -> ScoredAnswers:
    return ScoredAnswers([chosen, rejected], lengths, [1.0, 2.0], source)


def test_a_tie_counts_one_half() -> None:
    metrics = pair_metrics([pair(1, 0), pair(0, 0), pair(0, 2), pair(3, 1)])
    assert metrics["accuracy"] == 2.5 / 4
    assert metrics["tie_rate"] == 1 / 4
    assert metrics["margin"] == (1 + 0 - 2 + 2) / 4


def test_log_loss_of_a_lead_of_log_3_is_log_4_over_3() -> None:
    assert pair_metrics([pair(math.log(3), 0)])["log_loss"] == pytest.approx(math.log(4 / 3))


def test_a_lead_that_is_right_as_often_as_it_says_is_calibrated() -> None:
    """sigmoid(log 3) = 3/4: right in three of four."""
    lead = math.log(3)
    groups = [pair(lead, 0), pair(lead, 0), pair(lead, 0), pair(0, lead)]
    assert pair_metrics(groups)["calibration_error"] == pytest.approx(0, abs=1e-12)
    assert pair_metrics(groups[:1] * 4)["calibration_error"] == pytest.approx(1 / 4)


def test_a_ranked_list_weighs_as_much_as_a_pair() -> None:
    """Three answers in the wrong order are three wrong pairs, but one group of two."""
    ranked = ScoredAnswers([0.0, 1.0, 2.0], [1, 1, 1], [1.0, 2.0, 3.0])
    assert pair_metrics([ranked, pair(1, 0)])["accuracy"] == 1 / 2


def test_equal_ranks_are_no_pair() -> None:
    tied = ScoredAnswers([5.0, 0.0, 1.0], [1, 1, 1], [1.0, 1.0, 2.0])
    assert pair_metrics([tied])["accuracy"] == 1 / 2
    with pytest.raises(DataError, match="different ranks"):
        pair_metrics([ScoredAnswers([1.0, 2.0], [1, 1], [1.0, 1.0])])


def test_rank_correlation_is_scipys() -> None:
    rng = np.random.default_rng(0)
    groups = [pair(*rng.normal(size=2), lengths=tuple(rng.integers(1, 5, size=2))) for _ in range(20)]
    scores = [score for group in groups for score in group.scores]
    lengths = [length for group in groups for length in group.lengths]
    assert pair_metrics(groups)["length_correlation"] == pytest.approx(spearmanr(scores, lengths).statistic)
    assert math.isnan(pair_metrics([pair(1, 0, lengths=(3, 3))])["length_correlation"])


def test_a_rule_for_the_longer_answer_is_shown_beside() -> None:
    metrics = pair_metrics(
        [pair(0, 1, lengths=(9, 2)), pair(0, 1, lengths=(2, 9)), pair(0, 1, lengths=(3, 3))]
    )
    assert metrics["longer_wins_accuracy"] == 1.5 / 3


def test_sources_are_told_apart() -> None:
    metrics = pair_metrics([pair(1, 0, source="a.jsonl"), pair(0, 1, source="b.jsonl")])
    assert (metrics["a.jsonl/accuracy"], metrics["b.jsonl/accuracy"], metrics["accuracy"]) == (1, 0, 0.5)
    assert not [name for name in pair_metrics([pair(1, 0, source="a.jsonl")]) if "/" in name]


def test_roc_points_are_both_sides_of_every_pair() -> None:
    labels, scores = roc_points([pair(2, 1), pair(0, 3)])
    assert labels.tolist() == [1, 1, 0, 0]
    assert scores.tolist() == [2, 0, 1, 3]


def test_an_encoded_row_gives_lengths_ranks_and_its_file() -> None:
    row = {"continuation_ids": [[1, 2], [3]], "source": "pairs.jsonl:7"}
    assert as_answers(row, [0.5, 0.1]) == ScoredAnswers([0.5, 0.1], [2, 1], [1.0, 2.0], "pairs.jsonl")
    assert as_answers({**row, "rank": [2.0, 1.0]}, [0.5, 0.1]).ranks == [2.0, 1.0]
