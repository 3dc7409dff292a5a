"""Numbers of classification: scikit-learn's on the same predictions, and what they leave out."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from sklearn import metrics

from ftlib.errors import MissingPackageError, ShapeError
from ftlib.evaluation.outcomes import Outcomes, calibration_error, class_report, classification_metrics

NAMES = ("a", "b", "c")
GENERATOR = np.random.default_rng(0)
SCORES = GENERATOR.normal(size=(40, 3))
SHARES = np.exp(SCORES) / np.exp(SCORES).sum(-1, keepdims=True)
CLASSES = GENERATOR.integers(3, size=40)
SINGLE = Outcomes(NAMES, np.eye(3, dtype=np.int64)[CLASSES], SHARES)
SETS = GENERATOR.integers(2, size=(40, 3))
SEVERAL = Outcomes(NAMES, SETS, 1 / (1 + np.exp(-SCORES)), several=True)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("outcomes", [SINGLE, SEVERAL], ids=["one class", "several"])
def test_numbers_are_scikit_learns_on_the_same_predictions(outcomes, beta):
    if outcomes.several:
        truth, predicted = SETS, (outcomes.probabilities_BK > 0.5).astype(int)
        areas = {"y_true": SETS, "y_score": outcomes.probabilities_BK, "average": "macro"}
        loss = np.mean([metrics.log_loss(SETS[:, k], outcomes.probabilities_BK[:, k]) for k in range(3)])
        auroc = metrics.roc_auc_score(**areas)
    else:
        truth, predicted = CLASSES, SHARES.argmax(-1)
        areas = {"y_true": np.eye(3)[CLASSES], "y_score": SHARES, "average": "macro"}
        loss = metrics.log_loss(CLASSES, SHARES)
        auroc = metrics.roc_auc_score(CLASSES, SHARES, multi_class="ovr", average="macro")
    expected = {
        "accuracy": metrics.accuracy_score(truth, predicted),
        "auroc": auroc,
        "auprc": metrics.average_precision_score(**areas),
        "log_loss": loss,
    }
    for average in ("macro", "micro"):
        given = {"y_true": truth, "y_pred": predicted, "average": average}
        expected |= {
            f"precision_{average}": metrics.precision_score(**given),
            f"recall_{average}": metrics.recall_score(**given),
            f"f1_{average}": metrics.f1_score(**given),
        }
        if beta != 1.0:
            expected[f"f_beta_{average}"] = metrics.fbeta_score(**given, beta=beta)
    found = classification_metrics(outcomes, beta=beta)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert set(found) == {*expected, "calibration_error"}


@pytest.mark.parametrize("outcomes", [SINGLE, SEVERAL], ids=["one class", "several"])
def test_each_class_is_scikit_learns_row_of_its_report(outcomes):
    predicted = outcomes.predicted_BK
    expected = metrics.classification_report(
        outcomes.truth_BK, predicted, target_names=NAMES, output_dict=True, zero_division=0
    )
    found = class_report(outcomes)
    assert list(found) == list(NAMES)
    for name in NAMES:
        names = {"precision": "precision", "recall": "recall", "f1-score": "f1", "support": "rows"}
        assert {mine: found[name][mine] for mine in names.values()} == pytest.approx(
            {mine: expected[name][theirs] for theirs, mine in names.items()}
        )
    means = {area: np.mean([found[name][area] for name in NAMES]) for area in ("auroc", "auprc")}
    assert means == pytest.approx({area: classification_metrics(outcomes)[area] for area in means})


def test_a_class_that_no_row_has_is_left_out_of_the_areas_and_costs_no_warning():
    outcomes = Outcomes(NAMES, np.eye(3, dtype=np.int64)[[0, 1, 1, 0]], SHARES[:4])
    areas = [metrics.roc_auc_score(np.eye(3)[[0, 1, 1, 0]][:, k], SHARES[:4, k]) for k in (0, 1)]
    found = classification_metrics(outcomes)
    assert found["auroc"] == pytest.approx(np.mean(areas))
    assert math.isnan(class_report(outcomes)["c"]["auroc"])
    alone = Outcomes(NAMES, np.eye(3, dtype=np.int64)[[0, 0]], SHARES[:2])
    assert math.isnan(classification_metrics(alone)["auroc"])


def test_a_classifier_that_is_right_as_often_as_it_says_is_calibrated():
    """Of four rows at 0.75, three are right; of two at 0.5, one."""
    shares = np.array([[0.75, 0.25]] * 4 + [[0.5, 0.5]] * 2)
    truth = np.array([[1, 0]] * 3 + [[0, 1]] + [[1, 0], [0, 1]])
    assert calibration_error(Outcomes(("a", "b"), truth, shares)) == pytest.approx(0.0)
    sure = Outcomes(("a", "b"), truth[:4], np.array([[1.0, 0.0]] * 4))
    assert calibration_error(sure) == pytest.approx(0.25)


def test_every_decision_of_a_set_of_classes_counts_for_its_calibration():
    """Confidence 0.8 four times, right three times: a gap of 0.05; confidence 1 right twice: none."""
    shares = np.array([[0.8, 0.2, 1.0], [0.2, 0.8, 1.0]])
    truth = np.array([[1, 0, 1], [0, 0, 1]])
    outcomes = Outcomes(NAMES, truth, shares, several=True)
    assert calibration_error(outcomes) == pytest.approx(0.05 * 4 / 6)


def test_certainty_that_is_wrong_costs_a_finite_loss():
    outcomes = Outcomes(("a", "b"), np.array([[1, 0], [0, 1]]), np.array([[0.0, 1.0], [0.5, 0.5]]))
    assert 300 < classification_metrics(outcomes)["log_loss"] < 400


def test_shapes_that_do_not_fit_are_refused():
    for truth, shares in ((np.eye(3)[:0], SHARES[:0]), (np.eye(2), SHARES[:2]), (np.eye(3), SHARES[:2])):
        with pytest.raises(ShapeError, match=r"probabilities \[B, 3\] of at least one row"):
            Outcomes(NAMES, truth.astype(int), shares)


def test_without_scikit_learn_the_install_command_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    for function in (classification_metrics, class_report):
        with pytest.raises(MissingPackageError, match=r"pip install 'ftlib\[metrics\]'"):
            function(SINGLE)
