"""The figures' data, not their pixels."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from ftlib.errors import ConfigError
from ftlib.evaluation import plots
from ftlib.evaluation.pairs import ScoredAnswers

HISTORY = [
    {"step": 1, "loss": 2.0, "learning_rate": 1e-3},
    {"step": 2, "loss": 1.0, "learning_rate": 5e-4},
    {"step": 2, "eval_loss": 1.5},
]
SIDES = [
    {"step": 1, "margin": 0.0, "reward_chosen": 0.0, "reward_rejected": 0.0, "accuracy": 0.5},
    {"step": 2, "margin": 0.3, "reward_chosen": 0.1, "reward_rejected": -0.2, "accuracy": 0.75},
]


def drawn(figure: Figure, axes: int = 0) -> dict[str, list[float]]:
    return {line.get_label(): [float(y) for y in line.get_ydata()] for line in figure.axes[axes].lines}


def test_loss_keeps_the_raw_points_beside_the_running_mean() -> None:
    lines = drawn(plots.loss(HISTORY))
    assert lines["training"] == [2.0, 1.0]
    assert lines["running mean, 0.9"] == pytest.approx([2.0, 0.9 * 2.0 + 0.1 * 1.0])
    assert lines["evaluation"] == [1.5]


def test_the_learning_rate_has_an_axis_of_its_own() -> None:
    figure = plots.loss(HISTORY)
    assert next(iter(drawn(figure, 1).values())) == [1e-3, 5e-4]
    assert "learning rate" in figure.axes[1].get_ylabel()


def test_margins_show_both_sides_and_the_accuracy() -> None:
    figure = plots.margins(SIDES)
    assert drawn(figure) == {
        "reward chosen": [0.0, 0.1],
        "reward rejected": [0.0, -0.2],
        "margin": [0.0, 0.3],
    }
    assert next(iter(drawn(figure, 1).values())) == [0.5, 0.75]
    assert len({line.get_linestyle() for line in figure.axes[0].lines}) == 3


def test_margins_of_another_trainer_are_refused() -> None:
    with pytest.raises(ConfigError, match="preference trainer"):
        plots.margins(HISTORY)


def test_roc_of_perfect_scores_has_area_one() -> None:
    answers = [ScoredAnswers([2.0, 0.0], [1, 1], [1.0, 2.0]), ScoredAnswers([3.0, 1.0], [1, 1], [1.0, 2.0])]
    figure = plots.roc(answers)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert any("2 pairs" in label and "AUC = 1.00" in label for label in labels)


def test_a_given_axes_is_drawn_on() -> None:
    axes = Figure().subplots()
    assert plots.loss(HISTORY, ax=axes) is axes.get_figure()
