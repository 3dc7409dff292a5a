"""The temperature: found where a search finds it, and no change of what is likeliest."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from ftlib.errors import ShapeError
from ftlib.evaluation.calibration import fit_temperature, probabilities
from ftlib.evaluation.outcomes import Outcomes, calibration_error

GENERATOR = np.random.default_rng(0)
TRUE = 1.5 * GENERATOR.normal(size=(4000, 3))
SHARES = np.exp(TRUE) / np.exp(TRUE).sum(-1, keepdims=True)
CLASSES = np.array([GENERATOR.choice(3, p=share) for share in SHARES])
SINGLE = np.eye(3)[CLASSES]
SEVERAL = (GENERATOR.random(TRUE.shape) < 1 / (1 + np.exp(-TRUE))).astype(float)


def loss(temperature, scores, truth, several):
    """The log-loss, by logarithms that stay finite."""
    z = scores / temperature
    if several:
        return (np.logaddexp(0, z) - truth * z).sum(-1).mean()
    return (np.logaddexp.reduce(z, axis=-1) - (truth * z).sum(-1)).mean()


@pytest.mark.parametrize(("truth", "several"), [(SINGLE, False), (SEVERAL, True)])
@pytest.mark.parametrize("sharpened", [0.4, 1.0, 5.0])
def test_scores_that_are_too_large_are_divided_by_as_much(truth, several, sharpened):
    """The scores that drew the truth need none: 4,000 rows tell them within a few percent."""
    scores = sharpened * TRUE
    found = fit_temperature(scores, truth, several=several)
    assert found == pytest.approx(sharpened, rel=0.06)
    searched = minimize_scalar(
        lambda log: loss(np.exp(log), scores, truth, several), bounds=(-3, 3), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    assert found == pytest.approx(float(np.exp(searched.x)), rel=1e-4)


def test_calibrated_probabilities_have_less_calibration_error_and_the_same_answers():
    scores = 4 * TRUE
    found = fit_temperature(scores, SINGLE)
    before, after = (
        Outcomes(("a", "b", "c"), SINGLE.astype(int), probabilities(scores, temperature=temperature))
        for temperature in (1.0, found)
    )
    assert calibration_error(after) < 0.03 < 0.1 < calibration_error(before)
    assert np.array_equal(before.predicted_BK, after.predicted_BK)


def test_probabilities_are_those_of_the_scores():
    assert np.allclose(probabilities(TRUE), SHARES)
    assert np.allclose(probabilities(np.array([[np.log(3.0)]]), several=True), [[0.75]])
    assert np.allclose(probabilities(np.array([[np.log(9.0), 0.0]]), temperature=2.0), [[0.75, 0.25]])
    far = probabilities(np.array([[1e4, -1e4]]), temperature=0.05)
    assert far.tolist() == [[1.0, 0.0]]
    assert probabilities(np.array([[-1e4]]), several=True).tolist() == [[0.0]]


@pytest.mark.parametrize(("scores", "found"), [([[2.0, 0.0]], 0.05), ([[0.0, 2.0]], 20.0)])
def test_rows_that_are_all_right_or_all_wrong_give_an_end_of_the_range_and_a_warning(scores, found, caplog):
    with caplog.at_level(logging.WARNING, logger="ftlib"):
        assert fit_temperature(np.array(scores), np.array([[1, 0]])) == found
    assert "Give more rows that were not trained on" in caplog.text


def test_shapes_that_do_not_fit_are_refused():
    for scores, truth in ((np.zeros((0, 2)), np.zeros((0, 2))), (np.zeros((2, 2)), np.zeros((2, 1)))):
        with pytest.raises(ShapeError, match=r"scores and truth \[B, K\]"):
            fit_temperature(scores, truth)
