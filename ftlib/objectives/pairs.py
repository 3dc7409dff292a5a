"""Which continuations of a batch are compared: pairs of a better and a worse one, and the best.

In a group of several continuations the first is the best and the last the worst, unless
``extras["rank"]`` ranks them: 1.0 is best, equal ranks are a tie. Groups are never compared with each
other.

Shapes: C continuations, G groups, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ftlib.batches import Mean, PackedBatch
from ftlib.errors import ShapeError

__all__ = ["Pairs", "best", "pairs"]


@final
@dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs of a batch.

    Args:
        chosen_P: the better continuation of each pair, int64, index into C.
        rejected_P: the worse one, of the same group.
        weight_P: float32, one over the number of pairs of the group, so that every group weighs one.
        margin_P: lead asked for, float32: the difference of ``extras["margin"]``; None without them.
        count: scalar float32, the number of groups that weigh one.
    """

    chosen_P: Tensor
    rejected_P: Tensor
    weight_P: Tensor
    margin_P: Tensor | None
    count: Tensor

    def mean(self, values_P: Tensor) -> Mean:
        """The mean over groups of the mean over their pairs, as its two halves."""
        return Mean((self.weight_P * values_P).sum(), self.count)


def pairs(batch: PackedBatch) -> Pairs:
    """All pairs of a better and a worse continuation of one group.

    A group whose tokens all have loss weight zero weighs zero: so a rank that has no examples left
    still takes part in a step.

    Raises:
        ShapeError: a group without a pair, or extras that are not one number per continuation.
    """
    device = batch.ids_T.device
    chosen, rejected, weights, group_of_pair, group_of_continuation = [], [], [], [], []
    start = 0
    for group, ranks in enumerate(_ranks(batch)):
        found = [
            (start + i, start + j)
            for i, better in enumerate(ranks)
            for j, worse in enumerate(ranks)
            if better < worse
        ]
        if not found:
            raise ShapeError(
                f"pairs: expected a better and a worse continuation in every group, got ranks {ranks} in "
                f"group {group}. Give a chosen and a rejected completion, or leave the group out."
            )
        chosen += [i for i, _ in found]
        rejected += [j for _, j in found]
        weights += [1 / len(found)] * len(found)
        group_of_pair += [group] * len(found)
        group_of_continuation += [group] * len(ranks)
        start += len(ranks)
    chosen_P, rejected_P, group_P, group_C = (
        torch.tensor(index, device=device)
        for index in (chosen, rejected, group_of_pair, group_of_continuation)
    )
    weight_G = batch.weights_N.new_zeros(len(batch.spans)).index_add(
        0, group_C[batch.owner_N], batch.weights_N
    )
    counted_G = (weight_G > 0).float()
    weight_P = torch.tensor(weights, device=device) * counted_G[group_P]
    margin_C = _extra(batch, "margin")
    margin_P = None if margin_C is None else margin_C[chosen_P] - margin_C[rejected_P]
    return Pairs(chosen_P, rejected_P, weight_P, margin_P, counted_G.sum())


def best(batch: PackedBatch) -> Tensor:
    """The best continuation of each group, the first among equals: int64 [G], index into C."""
    indices, start = [], 0
    for ranks in _ranks(batch):
        indices.append(start + min(range(len(ranks)), key=ranks.__getitem__))
        start += len(ranks)
    return torch.tensor(indices, device=batch.ids_T.device)


def _ranks(batch: PackedBatch) -> list[list[float]]:
    """The ranks of each group, on the host: they decide how many pairs there are."""
    rank_C = _extra(batch, "rank")
    if rank_C is None:
        return [[float(place) for place in range(len(span.continuations))] for span in batch.spans]
    flat = iter(rank_C.tolist())
    return [[next(flat) for _ in span.continuations] for span in batch.spans]


def _extra(batch: PackedBatch, name: str) -> Tensor | None:
    value_C = batch.extras.get(name)
    if value_C is not None and value_C.shape != (batch.continuations,):
        raise ShapeError(
            f"pairs: expected extras {name!r} with one number per continuation [{batch.continuations}], "
            f"got {tuple(value_C.shape)}."
        )
    return value_C
