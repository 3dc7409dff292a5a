"""What passes between phases: the batch of groups, and losses kept as sums and counts.

A *group* is a shared prefix and one or more continuations of it. Plain text is an empty prefix with
one continuation, a prompt with its completion is a prefix with one, a preference pair a prefix with
two. `PackedBatch` is a list of groups laid flat without padding; the prefix is present once, however
many continuations share it.

Shapes: T all tokens of a packed batch, N scored rows, C continuations of a batch, P and L tokens of
one prefix and of one continuation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from ftlib.errors import ShapeError

__all__ = ["Group", "LossOutput", "Mean", "PackedBatch", "Span"]


@final
@dataclass(frozen=True, eq=False)
class Group:
    """One encoded example: a shared prefix and its continuations, as token ids and loss weights.

    Args:
        prefix_ids: int64 [P]; P = 0 for plain text.
        prefix_weights: float32 [P], loss weight of each prefix token; all zero when the group has
            several continuations, because a shared token belongs to none of them.
        continuation_ids: one int64 [L] per continuation, L >= 1.
        continuation_weights: one float32 [L] per continuation, finite and >= 0.
        extras: name -> one float per continuation (margin, label, reference log-probability, ...).

    Raises:
        ShapeError: lengths that do not match, no continuation, an empty continuation, or weights on
            a prefix that is shared.
    """

    prefix_ids: Tensor
    prefix_weights: Tensor
    continuation_ids: tuple[Tensor, ...]
    continuation_weights: tuple[Tensor, ...]
    extras: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pairs = [(self.prefix_ids, self.prefix_weights)]
        if len(self.continuation_ids) != len(self.continuation_weights) or not self.continuation_ids:
            raise ShapeError(
                f"Group: expected one weight vector per continuation and at least one continuation, got "
                f"{len(self.continuation_ids)} continuations and {len(self.continuation_weights)} weight "
                "vectors."
            )
        pairs += zip(self.continuation_ids, self.continuation_weights, strict=True)
        for ids, weights in pairs:
            if ids.ndim != 1 or ids.shape != weights.shape:
                raise ShapeError(
                    f"Group: expected ids and weights as vectors of one length, got "
                    f"{tuple(ids.shape)} and {tuple(weights.shape)}."
                )
        if any(len(ids) == 0 for ids in self.continuation_ids):
            raise ShapeError("Group: expected at least one token per continuation, got an empty one.")
        if len(self.continuation_ids) > 1 and bool((self.prefix_weights != 0).any()):
            raise ShapeError(
                "Group: expected zero weights on a prefix shared by several continuations, got weighted "
                "prefix tokens. Train prompts in groups with one continuation."
            )

    def __len__(self) -> int:
        """Tokens of the group, the prefix counted once."""
        return len(self.prefix_ids) + sum(len(ids) for ids in self.continuation_ids)


@final
@dataclass(frozen=True)
class Span:
    """Where one group lies in a packed batch: its first token, and the lengths of its parts.

    The prefix comes first, then the continuations in order, each directly after the last. Plain
    integers, so that laying out attention never waits for a device.
    """

    start: int
    prefix: int
    continuations: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past the last token of the group."""
        return self.start + self.prefix + sum(self.continuations)


@final
@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Groups laid flat without padding, and the rows whose predictions are scored.

    Args:
        ids_T: token ids, int64 [T].
        positions_T: position of each token in its own sequence, int64 [T]; continuations restart
            at the length of their prefix.
        spans: one `Span` per group, in order, covering all T tokens.
        rows_N: index into T of the hidden state that predicts, int64 [N]. The last prefix row
            appears once per continuation.
        targets_N: the token predicted, int64 [N].
        weights_N: loss weight of that token, float32 [N], >= 0.
        owner_N: which continuation the token belongs to, int64 [N], counted over the batch.
        extras: name -> float tensor [C], one value per continuation.
    """

    ids_T: Tensor
    positions_T: Tensor
    spans: tuple[Span, ...]
    rows_N: Tensor
    targets_N: Tensor
    weights_N: Tensor
    owner_N: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def continuations(self) -> int:
        """C, the number of continuations."""
        return sum(len(span.continuations) for span in self.spans)

    @property
    def tokens(self) -> int:
        """T, the number of real tokens."""
        return len(self.ids_T)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        move = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("ids_T", "positions_T", "rows_N", "targets_N", "weights_N", "owner_N")
        }
        extras = {name: value.to(device, non_blocking=True) for name, value in self.extras.items()}
        return replace(self, **move, extras=extras)


@final
@dataclass(frozen=True, eq=False)
class Mean:
    """A mean kept as its two halves, so that it merges across micro-batches and ranks.

    Args:
        sum: scalar tensor.
        count: scalar tensor, the weight inside `sum`.
    """

    sum: Tensor
    count: Tensor

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.sum + other.sum, self.count + other.count)

    def detach(self) -> Mean:
        """The same halves without gradient."""
        return Mean(self.sum.detach(), self.count.detach())

    @property
    def value(self) -> Tensor:
        """`sum / count`; zero where nothing was counted."""
        return self.sum / torch.where(self.count > 0, self.count, torch.ones_like(self.count))


@final
@dataclass(frozen=True, eq=False)
class LossOutput:
    """What one micro-batch adds to a step. Only the sums of `terms` carry gradient.

    Args:
        terms: name -> `Mean`; each term has its own denominator.
        metrics: name -> `Mean`, detached; device accumulators read only when a step is logged.
    """

    terms: Mapping[str, Mean]
    metrics: Mapping[str, Mean] = field(default_factory=dict)

    def loss(self, counts: Mapping[str, Tensor | float]) -> Tensor:
        """Sum over the terms of `sum / count`, the counts being those of the whole step.

        Args:
            counts: term -> its count over every micro-batch and rank of the step, as
                `objective.counts(batch)` gives and a caller adds up.

        Raises:
            ShapeError: a term without a count.
        """
        missing = sorted(set(self.terms) - set(counts))
        if missing:
            raise ShapeError(
                f"LossOutput.loss: expected a count for each of {sorted(self.terms)}, missing {missing}."
            )
        parts = [
            mean.sum / torch.as_tensor(counts[name]).clamp(min=torch.finfo(torch.float32).tiny)
            for name, mean in self.terms.items()
        ]
        return torch.stack(parts).sum()
