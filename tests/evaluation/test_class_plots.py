"""Pictures of a classifier: what is drawn is scikit-learn's, on an axis of the caller's or a new one."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn import metrics

from ftlib.errors import ConfigError
from ftlib.evaluation import plots
from ftlib.evaluation.outcomes import Outcomes
from tests.evaluation.test_outcomes import CLASSES, SEVERAL, SHARES, SINGLE

TWO = Outcomes(
    ("ham", "spam"), np.eye(2, dtype=int)[CLASSES % 2], SHARES[:, :2] / SHARES[:, :2].sum(-1, keepdims=True)
)


@pytest.fixture(autouse=True)
def no_figure_of_pyplot():
    before = plt.get_fignums()
    yield
    assert plt.get_fignums() == before


def curves(figure):
    """Lines of the ROC by label; the chance line last."""
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


@pytest.mark.parametrize("outcomes", [SINGLE, SEVERAL], ids=["one class", "several"])
def test_each_class_has_its_curve_against_the_others_with_its_area_and_rows(outcomes):
    lines = curves(plots.roc(outcomes))
    assert len(lines) == len(outcomes.names) + 1
    styles = set()
    for k, name in enumerate(outcomes.names):
        truth, shares = outcomes.truth_BK[:, k], outcomes.probabilities_BK[:, k]
        area = metrics.roc_auc_score(truth, shares)
        line = lines[f"{name}, {truth.sum()} rows (AUC = {area:.2f})"]
        x, y, _ = metrics.roc_curve(truth, shares)
        assert np.allclose(line.get_xdata(), x)
        assert np.allclose(line.get_ydata(), y)
        styles.add((line.get_color(), line.get_linestyle()))
    assert len({colour for colour, _ in styles}) == len({style for _, style in styles}) == len(outcomes.names)


def test_of_two_classes_the_second_alone_is_drawn():
    assert next(iter(curves(plots.roc(TWO)))).startswith("spam,")
    assert len(curves(plots.roc(TWO))) == 2


def test_many_classes_have_curves_that_all_look_different():
    count = 9
    truth = np.eye(count, dtype=int)[np.arange(40) % count]
    outcomes = Outcomes(tuple("abcdefghi"), truth, np.random.default_rng(0).random((40, count)))
    lines = list(curves(plots.roc(outcomes)).values())[:count]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == count


def test_rows_of_one_class_have_no_curve():
    with pytest.raises(ConfigError, match="a class that some rows have and others have not"):
        plots.roc(Outcomes(("a", "b"), np.array([[1, 0]]), np.array([[0.7, 0.3]])))


def test_the_confusion_matrix_counts_rows_of_every_class():
    figure = plots.confusion(SINGLE)
    cells = [int(text.get_text()) for text in figure.axes[0].texts]
    assert cells == metrics.confusion_matrix(CLASSES, SHARES.argmax(-1)).ravel().tolist()
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == list(SINGLE.names)
    assert "rows" in figure.axes[0].get_xlabel()


def test_several_classes_have_a_matrix_each():
    figure = plots.confusion(SEVERAL)
    assert [axes.get_title() for axes in figure.axes] == list(SEVERAL.names)
    for axes, expected in zip(
        figure.axes,
        metrics.multilabel_confusion_matrix(SEVERAL.truth_BK, SEVERAL.predicted_BK),
        strict=True,
    ):
        assert [int(text.get_text()) for text in axes.texts] == expected.ravel().tolist()
    with pytest.raises(ConfigError, match="ax has no effect with several"):
        plots.confusion(SEVERAL, ax=Figure().subplots())


@pytest.mark.parametrize("draw", [plots.roc, plots.confusion])
def test_an_axis_of_the_callers_is_drawn_on(draw):
    figure = Figure()
    axes = figure.subplots()
    assert draw(SINGLE, ax=axes) is figure
    assert axes.get_xlabel()
