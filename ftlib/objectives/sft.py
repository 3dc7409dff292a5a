"""Supervised fine-tuning, and domain pre-training: the same on text with an empty prefix.

Shapes: N scored rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from torch import Tensor, nn

from ftlib.batches import LossOutput, Mean, PackedBatch
from ftlib.losses import nll
from ftlib.models import forward

__all__ = ["SFT"]


@final
@dataclass(frozen=True)
class SFT:
    """Weighted negative log-likelihood of the trained tokens.

        loss = sum_n w_n * -logp_n / sum_n w_n,   both sums over the whole optimiser step

    Example:
        >>> import torch
        >>> from ftlib.batches import Group
        >>> from ftlib.data import collate
        >>> ids, weights = torch.tensor([6, 7]), torch.tensor([1.0, 0.5])
        >>> group = Group(torch.tensor([5]), torch.zeros(1), (ids,), (weights,))
        >>> SFT().counts(collate([group]))
        {'nll': tensor(1.5000)}
    """

    def counts(self, batch: PackedBatch) -> Mapping[str, Tensor]:
        """Sum of the loss weights."""
        return {"nll": batch.weights_N.sum()}

    def __call__(self, model: nn.Module, batch: PackedBatch) -> LossOutput:
        """Sum and count of the weighted losses."""
        losses_N = nll(forward(model, batch).logprobs_N)
        return LossOutput({"nll": Mean((batch.weights_N * losses_N).sum(), batch.weights_N.sum())})
