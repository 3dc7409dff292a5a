"""Hand-made batches of groups with several answers, and what a model might say of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ftlib.batches import Group, PackedBatch
from ftlib.data import collate
from ftlib.models import Scored

__all__ = ["Given", "answers", "batch_of", "pair", "says", "scores"]


def answers(*lengths: int, weight: float = 1.0, **extras: Sequence[float]) -> Group:
    """A prompt of two tokens and answers of these lengths; extras are one number per answer."""
    return Group(
        prefix_ids=torch.tensor([5, 6]),
        prefix_weights=torch.zeros(2),
        continuation_ids=tuple(torch.arange(10, 10 + length) for length in lengths),
        continuation_weights=tuple(torch.full((length,), weight) for length in lengths),
        extras={name: tuple(values) for name, values in extras.items()},
    )


def pair(**extras: Sequence[float]) -> Group:
    """A chosen answer of three tokens and a rejected one of two."""
    return answers(3, 2, **extras)


def batch_of(*groups: Group) -> PackedBatch:
    return collate(groups)


def says(*logprobs: Sequence[float]) -> Scored:
    """Log-probabilities of the tokens of each answer."""
    return Scored(torch.tensor([value for answer in logprobs for value in answer]).requires_grad_())


def scores(*values: float) -> Scored:
    """One score per answer, as a reward model gives them."""
    scores_CK = torch.tensor(values, dtype=torch.float32)[:, None].requires_grad_()
    return Scored(torch.empty(0), scores_CK=scores_CK)


class Given:
    """A reference that gives these log-probabilities, and counts how often it is asked."""

    def __init__(self, logprobs_N: Tensor | None = None) -> None:
        self.logprobs_N, self.asked = logprobs_N, 0

    def logprobs(self, batch: PackedBatch) -> Tensor:
        self.asked += 1
        return torch.zeros(len(batch.targets_N)) if self.logprobs_N is None else self.logprobs_N
