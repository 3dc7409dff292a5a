"""Reward modelling: a score that is higher for the better of two completions.

Shapes: C continuations, P pairs, K scores per continuation (1 here).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn

from ftlib.batches import LossOutput, PackedBatch
from ftlib.checks import check, number
from ftlib.errors import ShapeError
from ftlib.losses import bradley_terry
from ftlib.models import Scored, forward
from ftlib.objectives.pairs import pairs
from ftlib.objectives.protocol import Needs

__all__ = ["Reward"]


@final
@dataclass(frozen=True)
class Reward:
    """`losses.bradley_terry` of the scores of each pair; a group of K completions is all its pairs, averaged.

        loss = sum over groups of the mean over its pairs / number of groups

    ``extras["margin"]`` and ``extras["rank"]`` of the batch are heeded.

    Metrics, means over pairs weighted like the loss: ``accuracy`` (chosen above rejected, a tie counts
    one half), ``tie_rate``, ``margin`` (chosen less rejected), ``reward_chosen``, ``reward_rejected``.

    Args:
        center: weight of ``(chosen + rejected)^2``, >= 0; keeps scores around zero.

    Raises:
        ConfigError: a negative or infinite `center`.
    """

    center: float = 0.0

    needs: ClassVar[Needs] = Needs(scores=True)

    def __post_init__(self) -> None:
        check("objectives.Reward", {"center": (self.center, number(0))})

    def counts(self, batch: PackedBatch) -> Mapping[str, Tensor]:
        """The number of groups."""
        return {"bradley_terry": pairs(batch).count}

    def of(self, scored: Scored, batch: PackedBatch) -> LossOutput:
        """Loss and metrics of the scores.

        Raises:
            ShapeError: no scores, or not one per continuation.
        """
        scores_CK = scored.scores_CK
        if scores_CK is None or scores_CK.shape != (batch.continuations, 1):
            raise ShapeError(
                f"objectives.Reward: expected one score per continuation [{batch.continuations}, 1], got "
                f"{None if scores_CK is None else tuple(scores_CK.shape)}. Load the model with "
                'ftlib.load(name, task="reward").'
            )
        two = pairs(batch)
        chosen_P, rejected_P = scores_CK[two.chosen_P, 0], scores_CK[two.rejected_P, 0]
        losses_P = bradley_terry(chosen_P, rejected_P, margin_B=two.margin_P, center=self.center)
        terms = {"bradley_terry": two.mean(losses_P)}
        chosen_P, rejected_P = chosen_P.detach(), rejected_P.detach()
        sign_P = (chosen_P - rejected_P).sign()
        shown = {
            "accuracy": (sign_P + 1) / 2,
            "tie_rate": 1 - sign_P.abs(),
            "margin": chosen_P - rejected_P,
            "reward_chosen": chosen_P,
            "reward_rejected": rejected_P,
        }
        return LossOutput(terms, {name: two.mean(values_P) for name, values_P in shown.items()})

    def __call__(self, model: nn.Module, batch: PackedBatch) -> LossOutput:
        """`of` the model's scores."""
        return self.of(forward(model, batch, scores=True), batch)
