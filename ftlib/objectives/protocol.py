"""What an objective is: a function of a model and a batch that sums and counts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from ftlib.batches import LossOutput, PackedBatch

__all__ = ["Objective"]


class Objective(Protocol):
    """Level 2 of the library. No optimiser, no logging, no rank; the caller divides and steps."""

    def counts(self, batch: PackedBatch) -> Mapping[str, Tensor]:
        """The count of each loss term, a scalar tensor, from the batch alone.

        A caller adds these up over all micro-batches and ranks of a step *before* the first backward.
        """

    def __call__(self, model: nn.Module, batch: PackedBatch) -> LossOutput:
        """Terms and metrics of one micro-batch, as sums and counts."""
