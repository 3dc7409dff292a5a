"""Supervised fine-tuning, and domain pre-training: the same on text with an empty prefix.

Shapes: N scored rows, C continuations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from ftlib.batches import LossOutput, Mean, PackedBatch
from ftlib.losses import nll
from ftlib.models import Scored, forward
from ftlib.objectives.pairs import best
from ftlib.objectives.protocol import Needs

__all__ = ["SFT"]


@final
@dataclass(frozen=True)
class SFT:
    """Weighted negative log-likelihood of the trained tokens.

        loss = sum_n w_n * -logp_n / sum_n w_n,   both sums over the whole optimiser step

    Of several continuations of one prefix the best alone is trained: the chosen one of a pair.

    Example:
        >>> import torch
        >>> from ftlib.batches import Group
        >>> from ftlib.data import collate
        >>> ids, weights = torch.tensor([6, 7]), torch.tensor([1.0, 0.5])
        >>> group = Group(torch.tensor([5]), torch.zeros(1), (ids,), (weights,))
        >>> SFT().counts(collate([group]))
        {'nll': tensor(1.5000)}
    """

    needs: ClassVar[Needs] = Needs()

    def counts(self, batch: PackedBatch) -> Mapping[str, Tensor]:
        """Sum of the loss weights."""
        return {"nll": _weights(batch).sum()}

    def of(self, scored: Scored, batch: PackedBatch) -> LossOutput:
        """Sum and count of the weighted losses."""
        weights_N = _weights(batch)
        return LossOutput({"nll": Mean((weights_N * nll(scored.logprobs_N)).sum(), weights_N.sum())})

    def __call__(self, model: nn.Module, batch: PackedBatch) -> LossOutput:
        """`of` the model's log-probabilities."""
        return self.of(forward(model, batch), batch)


def _weights(batch: PackedBatch) -> Tensor:
    """Loss weights [N], zero outside the best continuation of each group."""
    if batch.continuations == len(batch.spans):
        return batch.weights_N
    best_C = torch.zeros(batch.continuations, dtype=torch.bool, device=batch.ids_T.device)
    best_C[best(batch)] = True
    return batch.weights_N * best_C[batch.owner_N]
