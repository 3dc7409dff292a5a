"""Classification: one class per row, or any set of them.

Which of the two it is stands in the batch: ``extras["label"]`` is the index of a row's one class,
``extras["label_0"]``, ``extras["label_1"]``, ... say of each class whether the row has it.

Shapes: C continuations (rows), K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ftlib.batches import LossOutput, Mean, PackedBatch
from ftlib.checks import check, listed, number
from ftlib.errors import ShapeError
from ftlib.losses import binary_cross_entropy, class_weight_of, cross_entropy
from ftlib.models import Scored, forward
from ftlib.objectives.protocol import Needs

__all__ = ["Classification"]


@final
@dataclass(frozen=True)
class Classification:
    """`losses.cross_entropy` of rows with one class, `losses.binary_cross_entropy` of rows with several.

        one class:      loss = sum over rows of r w_y (-log p_y) / sum over rows of r w_y
        any set:        loss = sum over rows of r (mean over classes, weighted by w) / sum over rows of r

    with class weights w and row weights r (``extras["weight"]``, 1 without it), sums over the whole step.

    Metric: ``accuracy``, the share of rows whose class, or whose whole set of classes, is right.

    Args:
        class_weights: one per class, > 0; None weighs all alike.
        label_smoothing: share of a row that is spread over all classes, in [0, 1).

    Raises:
        ConfigError: a value out of range.

    Example:
        >>> objective = Classification(class_weights=(1.0, 3.0))
        >>> objective.label_smoothing
        0.0
    """

    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0

    needs: ClassVar[Needs] = Needs(scores=True)

    def __post_init__(self) -> None:
        weights = listed("finite numbers > 0, one per class", number(above=0).holds, least=1)
        check(
            "objectives.Classification",
            {
                "label_smoothing": (self.label_smoothing, number(0, below=1)),
                "class_weights": (self.class_weights, weights.or_none),
            },
        )

    def counts(self, batch: PackedBatch) -> Mapping[str, Tensor]:
        """The weight of the rows, with that of their classes where each row has one."""
        targets = _targets(batch)
        if targets.ndim == 2:
            return {"binary_cross_entropy": _row_weights(batch).sum()}
        return {"cross_entropy": (_row_weights(batch) * self._class_weight_of(targets)).sum()}

    def of(self, scored: Scored, batch: PackedBatch) -> LossOutput:
        """Loss and accuracy of the scores.

        Raises:
            ShapeError: no scores, or a label that is none of theirs.
        """
        scores_CK, targets = self._checked(scored, batch), _targets(batch)
        weight_C, weight_K = _row_weights(batch), self._weights(scores_CK)
        if targets.ndim == 2:
            losses_C = binary_cross_entropy(
                scores_CK, targets, weight_K=weight_K, label_smoothing=self.label_smoothing
            )
            term, counted_C = "binary_cross_entropy", weight_C
            right_C = ((scores_CK > 0) == (targets > 0)).all(-1)
        else:
            losses_C = cross_entropy(
                scores_CK, targets, weight_K=weight_K, label_smoothing=self.label_smoothing
            )
            term, counted_C = "cross_entropy", weight_C * self._class_weight_of(targets)
            right_C = scores_CK.argmax(-1) == targets
        accuracy = Mean((weight_C * right_C).sum(), weight_C.sum()).detach()
        return LossOutput({term: Mean((weight_C * losses_C).sum(), counted_C.sum())}, {"accuracy": accuracy})

    def __call__(self, model: nn.Module, batch: PackedBatch) -> LossOutput:
        """`of` the model's scores."""
        return self.of(forward(model, batch, scores=True), batch)

    def _weights(self, like: Tensor) -> Tensor | None:
        return None if self.class_weights is None else like.new_tensor(self.class_weights)

    def _class_weight_of(self, labels_C: Tensor) -> Tensor:
        weight_K = None if self.class_weights is None else torch.tensor(self.class_weights)
        return class_weight_of(labels_C, weight_K)

    def _checked(self, scored: Scored, batch: PackedBatch) -> Tensor:
        scores_CK, targets = scored.scores_CK, _targets(batch)
        classes = None if targets.ndim == 1 else targets.shape[1]
        if scores_CK is None or scores_CK.ndim != 2 or scores_CK.shape[1] != (classes or scores_CK.shape[1]):
            raise ShapeError(
                f"objectives.Classification: expected scores of {classes or 'all'} classes, got "
                f"{None if scores_CK is None else tuple(scores_CK.shape)}. Load the model with "
                'ftlib.load(name, task="classification", num_labels=...).'
            )
        if self.class_weights is not None and len(self.class_weights) != scores_CK.shape[1]:
            raise ShapeError(
                f"objectives.Classification: expected one class weight per class ({scores_CK.shape[1]}), got "
                f"{len(self.class_weights)}."
            )
        return scores_CK


def _targets(batch: PackedBatch) -> Tensor:
    """Class indices int64 [C]; or one column per class, float32 [C, K].

    Raises:
        ShapeError: no labels.
    """
    extras = batch.extras
    if "label" in extras:
        return extras["label"].long()
    columns = list(takewhile(extras.__contains__, (f"label_{k}" for k in count())))
    if not columns:
        raise ShapeError(
            f"objectives.Classification: expected extras 'label' or 'label_0', ..., got {sorted(extras)}. "
            "Encode rows with text and label by ftlib.data.LabelledEncoder."
        )
    return torch.stack([extras[name] for name in columns], -1)


def _row_weights(batch: PackedBatch) -> Tensor:
    """What each row counts, float32 [C]."""
    weight_C = batch.extras.get("weight")
    if weight_C is not None:
        return weight_C
    return torch.ones(batch.continuations, device=batch.ids_T.device)
