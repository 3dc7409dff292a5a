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


def test_reward_shows_score_distance_price_and_length() -> None:
    rows = [
        {"step": step, "score": score, "score_std": 0.5, "kl": kl, "beta": 0.05, "completion_tokens": 9.0}
        for step, score, kl in [(1, 0.0, 0.0), (2, 1.0, 3.0)]
    ]
    figure = plots.reward(rows, kl_target=2.0)
    scores, distances, lengths, price = (drawn(figure, axes) for axes in range(4))
    assert scores["mean"] == [0.0, 1.0]
    [spread] = figure.axes[0].collections
    assert {float(y) for y in spread.get_paths()[0].vertices[:, 1]} == {-0.5, 0.5, 1.5}
    assert distances["KL"] == [0.0, 3.0]
    assert distances["target"] == [2.0, 2.0]
    assert lengths["mean"] == [9.0, 9.0]
    assert list(price.values()) == [[0.05, 0.05]]


def test_reward_of_another_trainer_is_refused() -> None:
    with pytest.raises(ConfigError, match="PPO"):
        plots.reward(HISTORY)


def test_reward_draws_on_three_axes_or_none() -> None:
    rows = [{"step": 1, "score": 0.0, "score_std": 0.0, "kl": 0.0, "beta": 0.1, "completion_tokens": 1.0}]
    axes = Figure().subplots(3)
    assert plots.reward(rows, ax=axes) is axes[0].figure
    with pytest.raises(ConfigError, match="three axes"):
        plots.reward(rows, ax=axes[:2])


def test_roc_of_perfect_scores_has_area_one() -> None:
    answers = [ScoredAnswers([2.0, 0.0], [1, 1], [1.0, 2.0]), ScoredAnswers([3.0, 1.0], [1, 1], [1.0, 2.0])]
    figure = plots.roc(answers)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert any("2 pairs" in label and "AUC = 1.00" in label for label in labels)


def test_a_given_axes_is_drawn_on() -> None:
    axes = Figure().subplots()
    assert plots.loss(HISTORY, ax=axes) is axes.get_figure()
