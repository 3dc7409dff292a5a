"""Several templates or models as one classifier, and what it can teach another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from ftlib.data.cloze.formatter import PROBABILITIES
from ftlib.errors import ConfigError
from ftlib.evaluation.cloze.classifier import ClozeClassifier

__all__ = ["ClozeEnsemble"]

TEMPERATURE = 2.0


@final
class ClozeEnsemble:
    """The weighted mean of the scores of several classifiers: s = sum of w_p s_p / sum of w_p.

    Args:
        members: classifiers of the same classes.
        weights: one per member, >= 0; None weighs them alike.

    Raises:
        ConfigError: no members, members of other classes, or weights that do not fit.

    Source: Schick and Schütze 2021, section 3.3.
    """

    def __init__(self, members: Sequence[ClozeClassifier], weights: Sequence[float] | None = None) -> None:
        if not members or any(member.labels != members[0].labels for member in members):
            raise ConfigError(
                f"ClozeEnsemble: expected members of the same classes, got {[m.labels for m in members]}."
            )
        self.members = tuple(members)
        self.weights = self._checked([1.0] * len(members) if weights is None else weights)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, in the order of scores."""
        return self.members[0].labels

    def weigh(self, rows: Any) -> ClozeEnsemble:
        """Weigh each member by its accuracy on labelled rows: before any of them is trained on these."""
        self.weights = self._checked([member.accuracy(rows) for member in self.members])
        return self

    def scores(self, rows: Any) -> Tensor:
        """[B, K], nats."""
        weights_P = torch.tensor(self.weights)
        scores_PBK = torch.stack([member.scores(rows) for member in self.members])
        return (weights_P[:, None, None] * scores_PBK).sum(0) / weights_P.sum()

    def predict(self, rows: Any) -> list[str]:
        """The likeliest class of each row."""
        return [self.labels[k] for k in self.scores(rows).argmax(-1).tolist()]

    def teach(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Unlabelled rows with what this says of them, for another cloze classifier to be trained on.

        The column `probabilities` holds softmax(s / 2), the label is left out.

        Source: Schick and Schütze 2021, section 3.3, temperature 2.
        """
        shares_BK = (self.scores(rows) / TEMPERATURE).softmax(-1)
        labels = {member.formatter.label for member in self.members}
        return [
            {**{name: value for name, value in row.items() if name not in labels}, PROBABILITIES: shares}
            for row, shares in zip(rows, shares_BK.tolist(), strict=True)
        ]

    def _checked(self, weights: Sequence[float]) -> tuple[float, ...]:
        if len(weights) != len(self.members) or min(weights) < 0 or sum(weights) <= 0:
            raise ConfigError(
                f"ClozeEnsemble: expected one weight >= 0 per member ({len(self.members)}), not all zero, "
                f"got {list(weights)}."
            )
        return tuple(map(float, weights))
