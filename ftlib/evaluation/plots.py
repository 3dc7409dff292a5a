"""Pictures of a run and of its predictions: one call each, matplotlib's figure returned, nothing shown.

Line styles differ beside the colours, which are those of Wong 2011 for colour-blind readers. Needs
``pip install 'ftlib[plots]'``, `roc` and `confusion` also scikit-learn (``ftlib[metrics]``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ftlib.checks import Wanted, check, listed
from ftlib.errors import ConfigError, MissingPackageError
from ftlib.evaluation.outcomes import Outcomes
from ftlib.evaluation.pairs import ScoredAnswers, roc_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["confusion", "loss", "margins", "reward", "roc"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Wong 2011 (Nature Methods 8:441)
STYLES = ("-", "--", ":", "-.")
ANSWERS = listed(
    "what RewardTrainer.answers gives, or ClassificationTrainer.outcomes",
    lambda one: isinstance(one, ScoredAnswers),
)
OUTCOMES = Wanted("what ClassificationTrainer.outcomes gives", lambda value: isinstance(value, Outcomes))
SMOOTHED = 0.9  # share of the running mean that the smoothed line keeps of its past


class _HasHistory(Protocol):
    @property
    def history(self) -> list[dict[str, Any]]: ...


Run = _HasHistory | Sequence[Mapping[str, Any]]


def loss(result: Run, *, ax: Axes | None = None) -> Figure:
    """Training and evaluation loss by step, and the learning rate on an axis of its own.

    The raw points are kept; the line through them is a running mean, as the legend says.

    Args:
        result: what `train` returned, or its history.
        ax: draw here; None makes a figure.
    """
    rows, axes = _history(result), _axes(ax)
    trained, held_out = _series(rows, "loss"), _series(rows, "eval_loss")
    axes.plot(*trained, ".", color=COLOURS[0], alpha=0.5, label="training")
    axes.plot(trained[0], _smooth(trained[1]), STYLES[0], color=COLOURS[0], label=f"running mean, {SMOOTHED}")
    if held_out[0]:
        axes.plot(*held_out, f"o{STYLES[1]}", color=COLOURS[1], label="evaluation")
    rates = axes.twinx()
    rates.plot(*_series(rows, "learning_rate"), STYLES[2], color=COLOURS[2])
    rates.set_ylabel("learning rate (dotted)")
    return _labelled(axes, "optimiser step", "loss (nats)")


def margins(result: Run, *, ax: Axes | None = None) -> Figure:
    """What DPO does to the two sides: rewards of chosen and rejected answers, their margin, the accuracy.

    Args:
        result: what `train` of a preference trainer returned, or its history.
        ax: draw here; None makes a figure.

    Raises:
        ConfigError: the run has no such metrics.
    """
    rows, axes = _history(result), _axes(ax)
    names = ("reward_chosen", "reward_rejected", "margin")
    if not _series(rows, "margin")[0]:
        raise ConfigError(
            "plots.margins: expected the history of a preference trainer, got no 'margin' in it."
        )
    for name, colour, style in zip(names, COLOURS, STYLES, strict=False):
        axes.plot(*_series(rows, name), style, color=colour, label=name.replace("_", " "))
    accuracy = axes.twinx()
    accuracy.plot(*_series(rows, "accuracy"), STYLES[3], color=COLOURS[3])
    accuracy.set(ylim=(0, 1), ylabel="accuracy (dash-dotted)")
    return _labelled(axes, "optimiser step", "reward")


def reward(result: Run, *, kl_target: float | None = None, ax: Sequence[Axes] | None = None) -> Figure:
    """What PPO gains and at what distance: score with its spread, KL and its price, length of completions.

    Args:
        result: what `PPOTrainer.train` returned, or its history.
        kl_target: nats per sequence, drawn beside the KL.
        ax: three axes to draw on, one for each of these; None makes a figure.

    Raises:
        ConfigError: the run has no such metrics, or not three axes.
    """
    rows = _history(result)
    if not _series(rows, "kl")[0]:
        raise ConfigError("plots.reward: expected the history of a PPO run, got no 'kl' in it.")
    panels = _stacked(3) if ax is None else list(ax)
    if len(panels) != 3:
        raise ConfigError(f"plots.reward: expected ax as three axes, got {len(panels)}.")
    scores, distances, lengths = panels
    scores.plot(*_series(rows, "score"), STYLES[0], color=COLOURS[0], label="mean")
    spread = [(row["step"], row["score"], row["score_std"]) for row in rows if "score_std" in row]
    steps, low, high = zip(*((step, mean - std, mean + std) for step, mean, std in spread), strict=True)
    scores.fill_between(steps, low, high, color=COLOURS[0], alpha=0.2, label="one standard deviation")
    distances.plot(*_series(rows, "kl"), STYLES[0], color=COLOURS[1], label="KL")
    if kl_target is not None:
        distances.axhline(kl_target, linestyle=STYLES[1], color=COLOURS[1], label="target")
    price = distances.twinx()
    price.plot(*_series(rows, "beta"), STYLES[2], color=COLOURS[2])
    price.set_ylabel("beta (dotted)")
    lengths.plot(*_series(rows, "completion_tokens"), STYLES[0], color=COLOURS[3], label="mean")
    _labelled(distances, "", "nats per sequence")
    _labelled(lengths, "rollout", "tokens of a completion")
    return _labelled(scores, "", "score")


def roc(answers: Sequence[ScoredAnswers] | Outcomes, *, ax: Axes | None = None) -> Figure:
    """ROC of the scores of better against worse answers, or of each class against the others; with areas.

    Of two classes that exclude each other the second alone is drawn: the first has the same curve.

    Args:
        answers: what `RewardTrainer.answers` or `ClassificationTrainer.outcomes` gives.
        ax: draw here; None makes a figure.

    Raises:
        ConfigError: no class that some rows have and others have not.
    """
    try:
        from sklearn.metrics import RocCurveDisplay
    except ImportError as error:
        raise _missing("plots.roc", "scikit-learn", "metrics") from error
    axes = _axes(ax)
    if isinstance(answers, Outcomes):
        return _roc_of_classes(answers, axes, RocCurveDisplay)
    check("plots.roc", {"answers": (answers, ANSWERS)})
    labels, scores = roc_points(answers)
    name = f"{int(labels.sum())} pairs"
    RocCurveDisplay.from_predictions(labels, scores, name=name, ax=axes, plot_chance_level=True)
    axes.set(xlabel="share of worse answers above the threshold", ylabel="share of better answers above it")
    return _figure(axes)


def confusion(outcomes: Outcomes, *, ax: Axes | None = None) -> Figure:
    """Which class is taken for which, in rows; of several classes per row, each against its absence.

    Args:
        outcomes: what `ClassificationTrainer.outcomes` gives.
        ax: draw here; None makes a figure. Not for several classes per row, which take an axis each.
    """
    try:
        from sklearn.metrics import ConfusionMatrixDisplay
    except ImportError as error:
        raise _missing("plots.confusion", "scikit-learn", "metrics") from error
    check("plots.confusion", {"outcomes": (outcomes, OUTCOMES)})
    look: dict[str, Any] = {"cmap": "cividis", "colorbar": False}
    count = len(outcomes.names)
    if not outcomes.several:
        axes = _axes(ax)
        both = outcomes.truth_BK.argmax(-1), outcomes.predicted_BK.argmax(-1)
        look |= {"labels": range(count), "display_labels": outcomes.names, "xticks_rotation": "vertical"}
        ConfusionMatrixDisplay.from_predictions(*both, ax=axes, **look)
        axes.set(xlabel="predicted class (cells: rows)", ylabel="true class")
        return _figure(axes)
    if ax is not None:
        raise ConfigError("plots.confusion: ax has no effect with several classes per row. Leave it out.")
    figure = _figure(_axes(None))
    figure.clear()
    figure.set_size_inches(3 * count, 3)
    for k, axes in enumerate(figure.subplots(1, count, squeeze=False)[0]):
        both = outcomes.truth_BK[:, k], outcomes.predicted_BK[:, k]
        ConfusionMatrixDisplay.from_predictions(*both, labels=(0, 1), ax=axes, **look)
        axes.set(title=outcomes.names[k], xlabel="predicted (cells: rows)", ylabel="true")
    return figure


def _roc_of_classes(outcomes: Outcomes, axes: Axes, display: Any) -> Figure:
    truth_BK = outcomes.truth_BK
    drawn = [k for k in range(len(outcomes.names)) if 0 < truth_BK[:, k].sum() < len(truth_BK)]
    if not drawn:
        raise ConfigError(
            "plots.roc: expected a class that some rows have and others have not, got none. Give more rows."
        )
    if len(outcomes.names) == 2 and not outcomes.several:
        drawn = drawn[-1:]
    looks = [(colour, style) for style in STYLES for colour in COLOURS]
    for place, k in enumerate(drawn):
        # one of each while they last, then the other pairs of colour and line style
        colour, style = (
            (COLOURS[place], STYLES[place]) if len(drawn) <= len(STYLES) else looks[place % len(looks)]
        )
        display.from_predictions(
            truth_BK[:, k],
            outcomes.probabilities_BK[:, k],
            name=f"{outcomes.names[k]}, {int(truth_BK[:, k].sum())} rows",
            ax=axes,
            plot_chance_level=k == drawn[-1],
            curve_kwargs={"color": colour, "linestyle": style},
        )
    axes.set(xlabel="share of other rows above the threshold", ylabel="share of the class's rows above it")
    return _figure(axes)


def _axes(ax: Axes | None) -> Axes:
    try:
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure
    except ImportError as error:
        raise _missing("plots", "matplotlib", "plots") from error
    check("plots", {"ax": (ax, Wanted("matplotlib's axes", lambda value: isinstance(value, Axes)).or_none)})
    # A figure of its own, without pyplot: the caller's backend and open figures stay as they are.
    return Figure(figsize=(7, 4), layout="constrained").subplots() if ax is None else ax


def _stacked(panels: int) -> list[Axes]:
    """Axes above each other that share their steps."""
    figure = _figure(_axes(None))
    figure.clear()
    figure.set_size_inches(7, 2.5 * panels)
    return list(figure.subplots(panels, sharex=True))


def _missing(where: str, package: str, extra: str) -> MissingPackageError:
    return MissingPackageError(
        f"{where}: expected {package}, which is not installed. Run: pip install 'ftlib[{extra}]'"
    )


def _figure(axes: Axes) -> Figure:
    figure: Any = axes.get_figure(root=True)
    return figure  # type: ignore[no-any-return]


def _labelled(axes: Axes, xlabel: str, ylabel: str) -> Figure:
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _figure(axes)


def _history(result: Run) -> Sequence[Mapping[str, Any]]:
    rows = getattr(result, "history", result)
    if isinstance(rows, Sequence) and all(isinstance(row, Mapping) for row in rows):
        return rows
    raise ConfigError(f"plots: expected what train() returned, or its history, got {result!r:.80}.")


def _series(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    points = [(int(row["step"]), float(row[name])) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean that starts at the first value."""
    smoothed: list[float] = []
    for value in values:
        smoothed.append(SMOOTHED * smoothed[-1] + (1 - SMOOTHED) * value if smoothed else value)
    return smoothed
