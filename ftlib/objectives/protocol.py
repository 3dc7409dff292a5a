"""What an objective is: a function of a model and a batch that sums and counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol, final, runtime_checkable

from torch import Tensor, nn

from ftlib.batches import LossOutput, PackedBatch
from ftlib.models import Scored
from ftlib.models.head import Entropy

__all__ = ["Needs", "Objective", "OfOneForward", "Prepared", "Referring"]


@runtime_checkable
@runtime_checkable
class Objective(Protocol):
    """Level 2 of the library. No optimiser, no logging, no rank; the caller divides and steps."""

    def counts(self, batch: PackedBatch) -> Mapping[str, Tensor]:
        """The count of each loss term, a scalar tensor, from the batch alone.

        A caller adds these up over all micro-batches and ranks of a step *before* the first backward.
        """

    def __call__(self, model: nn.Module, batch: PackedBatch) -> LossOutput:
        """Terms and metrics of one micro-batch, as sums and counts."""


@final
@dataclass(frozen=True)
class Needs:
    """What an objective reads of a forward beside log-probabilities. The flags of `models.forward`."""

    entropy: Entropy = False
    hidden: bool = False
    scores: bool = False
    values: bool = False

    def __or__(self, other: Needs) -> Needs:
        pairs = ((getattr(self, each.name), getattr(other, each.name)) for each in fields(self))
        # an entropy with a gradient serves those who read its value too
        return Needs(*(theirs if theirs == "gradient" else mine or theirs for mine, theirs in pairs))


@runtime_checkable
class OfOneForward(Objective, Protocol):
    """An objective that reads one forward of the model, and can share it with others.

    Calling it is ``of(forward(model, batch, ...), batch)``.
    """

    @property
    def needs(self) -> Needs:
        """The flags of that forward."""

    def of(self, scored: Scored, batch: PackedBatch) -> LossOutput:
        """Terms and metrics from what the forward gave."""


@runtime_checkable
class Prepared(OfOneForward, Protocol):
    """One that computes something first, such as a reference's log-probabilities.

    No other role of a model may run between a forward and its backward.
    """

    def prepare(self, batch: PackedBatch) -> PackedBatch:
        """The batch with what `of` will look for in its extras."""


@runtime_checkable
class Referring(Objective, Protocol):
    """One that compares the policy with a reference, which is made from the policy's present weights."""

    def bound(self, model: nn.Module, *, cache: bool | str | Path = True) -> Objective:
        """The same with its reference made: from now on, training the model does not move it.

        Args:
            model: the policy.
            cache: keep the reference's log-probabilities in memory, in a folder too, or not at all.
        """
