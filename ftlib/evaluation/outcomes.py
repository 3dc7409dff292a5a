"""What a classifier says of labelled rows, and the numbers made of it.

Counting and ranking are scikit-learn's (``pip install 'ftlib[metrics]'``).

Shapes: B rows, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from ftlib.errors import MissingPackageError, ShapeError

__all__ = ["Outcomes", "calibration_error", "class_report", "classification_metrics"]

BINS = 10  # of the calibration error
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@final
@dataclass(frozen=True, eq=False)
class Outcomes:
    """Labelled rows and what a classifier says of them.

    Args:
        names: the classes.
        truth_BK: 1 where the row has the class, else 0; one per row unless it may have several.
        probabilities_BK: in [0, 1]; of one row they sum to 1 unless it may have several classes.
        several: a row may have any set of classes.

    Raises:
        ShapeError: shapes that do not fit, or no rows.
    """

    names: tuple[str, ...]
    truth_BK: Ints
    probabilities_BK: Floats
    several: bool = False

    def __post_init__(self) -> None:
        shape = self.truth_BK.shape
        if (
            len(shape) != 2
            or shape != self.probabilities_BK.shape
            or shape[1] != len(self.names)
            or not shape[0]
        ):
            raise ShapeError(
                f"Outcomes: expected truth and probabilities [B, {len(self.names)}] of at least one row, got "
                f"{shape} and {self.probabilities_BK.shape}."
            )

    @property
    def predicted_BK(self) -> Ints:
        """The likeliest class, the first of equals; of several those above one half."""
        if self.several:
            above_BK: Ints = (self.probabilities_BK > 0.5).astype(np.int64)
            return above_BK
        likeliest_BK: Ints = np.eye(len(self.names), dtype=np.int64)[self.probabilities_BK.argmax(-1)]
        return likeliest_BK


def classification_metrics(outcomes: Outcomes, *, beta: float = 1.0) -> dict[str, float]:
    """Numbers that say how well rows are classified.

    | name | meaning |
    |---|---|
    | accuracy | share of rows whose class, or whose whole set of classes, is right |
    | precision_macro, recall_macro, f1_macro | mean over classes; 0 where one divides by 0 |
    | precision_micro, recall_micro, f1_micro | over all decisions |
    | f_beta_macro, f_beta_micro | likewise, with a beta other than 1 |
    | auroc | area under the ROC of each class against the others, mean over those that can be ranked |
    | auprc | average precision of each class against the others, likewise |
    | log_loss | mean negative log-probability of the truth, nats |
    | calibration_error | see `calibration_error` |

    Args:
        outcomes: at least one row.
        beta: of F-beta; above 1 recall weighs more than precision.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    metrics = _sklearn()
    if outcomes.several:
        truth, predicted = outcomes.truth_BK, outcomes.predicted_BK
    else:
        truth, predicted = outcomes.truth_BK.argmax(-1), outcomes.predicted_BK.argmax(-1)
    found = {"accuracy": float(metrics.accuracy_score(truth, predicted))}
    for average in ("macro", "micro"):
        options: dict[str, Any] = {
            "labels": range(len(outcomes.names)),
            "average": average,
            "zero_division": 0,
        }
        found |= {
            f"precision_{average}": float(metrics.precision_score(truth, predicted, **options)),
            f"recall_{average}": float(metrics.recall_score(truth, predicted, **options)),
            f"f1_{average}": float(metrics.f1_score(truth, predicted, **options)),
        }
        if beta != 1.0:
            found[f"f_beta_{average}"] = float(metrics.fbeta_score(truth, predicted, beta=beta, **options))
    return {
        **found,
        "auroc": _mean_over_classes(outcomes, metrics.roc_auc_score),
        "auprc": _mean_over_classes(outcomes, metrics.average_precision_score),
        "log_loss": _log_loss(outcomes),
        "calibration_error": calibration_error(outcomes),
    }


def class_report(outcomes: Outcomes, *, beta: float = 1.0) -> dict[str, dict[str, float]]:
    """Of each class by name: ``precision``, ``recall``, ``f1``, ``f_beta``, ``auroc``, ``auprc``, ``rows``.

    Areas are NaN where all rows have the class, or none. `pandas.DataFrame(report).T` is a table.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    metrics = _sklearn()
    truth_BK, predicted_BK, report = outcomes.truth_BK, outcomes.predicted_BK, {}
    for k, name in enumerate(outcomes.names):
        both, ranked = (truth_BK[:, k], predicted_BK[:, k]), (truth_BK[:, k], outcomes.probabilities_BK[:, k])
        decided = 0 < truth_BK[:, k].sum() < len(truth_BK)
        report[name] = {
            "precision": float(metrics.precision_score(*both, zero_division=0)),
            "recall": float(metrics.recall_score(*both, zero_division=0)),
            "f1": float(metrics.f1_score(*both, zero_division=0)),
            "f_beta": float(metrics.fbeta_score(*both, beta=beta, zero_division=0)),
            "auroc": float(metrics.roc_auc_score(*ranked)) if decided else nan,
            "auprc": float(metrics.average_precision_score(*ranked)) if decided else nan,
            "rows": float(truth_BK[:, k].sum()),
        }
    return report


def calibration_error(outcomes: Outcomes) -> float:
    """Expected gap between how sure the classifier is and how often it is right.

        sum over bins of (share of decisions) * abs(mean confidence - share that is right)

    in ten bins of equal width: of the likeliest class, whose confidence is its probability; of several
    classes, of every decision, whose confidence is ``max(p, 1 - p)``.

    Source: Guo et al. 2017 (arXiv:1706.04599), eq. 5.

    Example:
        >>> sure = Outcomes(("a", "b"), np.array([[1, 0], [0, 1]]), np.array([[0.95, 0.05], [0.95, 0.05]]))
        >>> round(calibration_error(sure), 2)  # right half of the time
        0.45
    """
    probabilities_BK = outcomes.probabilities_BK
    if outcomes.several:
        sure = np.maximum(probabilities_BK, 1 - probabilities_BK).ravel()
        right = (outcomes.predicted_BK == outcomes.truth_BK).ravel()
    else:
        sure = probabilities_BK.max(-1)
        right = outcomes.predicted_BK.argmax(-1) == outcomes.truth_BK.argmax(-1)
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=sure - right, minlength=BINS)
    return float(np.abs(gaps).sum() / len(sure))


def _mean_over_classes(outcomes: Outcomes, area: Any) -> float:
    """Over the classes that some rows have and others have not; NaN where there is none."""
    truth_BK = outcomes.truth_BK
    ranked = [k for k in range(len(outcomes.names)) if 0 < truth_BK[:, k].sum() < len(truth_BK)]
    areas = [float(area(truth_BK[:, k], outcomes.probabilities_BK[:, k])) for k in ranked]
    return float(np.mean(areas)) if areas else nan


def _log_loss(outcomes: Outcomes) -> float:
    tiny = np.finfo(np.float64).tiny
    p_BK, truth_BK = outcomes.probabilities_BK, outcomes.truth_BK
    logs_BK = truth_BK * np.log(np.maximum(p_BK, tiny))
    if not outcomes.several:
        return float(-logs_BK.sum(-1).mean())
    return float(-(logs_BK + (1 - truth_BK) * np.log(np.maximum(1 - p_BK, tiny))).mean())


def _sklearn() -> Any:
    try:
        import sklearn.metrics as metrics
    except ImportError as error:
        raise MissingPackageError(
            "classification_metrics: expected scikit-learn, which is not installed. Run: "
            "pip install 'ftlib[metrics]'"
        ) from error
    return metrics
