"""What passes between phases: the batch of groups, rollouts, and losses kept as sums and counts.

A *group* is a shared prefix and one or more continuations of it. Plain text is an empty prefix with
one continuation, a prompt with its completion is a prefix with one, a preference pair a prefix with
two. `PackedBatch` is a list of groups laid flat without padding; the prefix is present once, however
many continuations share it. A `Rollout` is one sampled completion of one prompt, unpadded, with
everything that a policy loss needs.

Shapes: T all tokens of a packed batch, N scored rows, C continuations of a batch, P and L tokens of
one prefix (or prompt) and of one continuation (or completion).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from ftlib.errors import ConfigError, NonFiniteError, ShapeError

__all__ = ["Group", "LossOutput", "Mean", "PackedBatch", "Rollout", "Sampling", "Span"]


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
        token_extras: name -> one float32 [L] per continuation (advantages, old log-probabilities, ...).

    Raises:
        ShapeError: lengths that do not match, no continuation, an empty continuation, or weights on
            a prefix that is shared.
    """

    prefix_ids: Tensor
    prefix_weights: Tensor
    continuation_ids: tuple[Tensor, ...]
    continuation_weights: tuple[Tensor, ...]
    extras: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    token_extras: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pairs = [(self.prefix_ids, self.prefix_weights)]
        if len(self.continuation_ids) != len(self.continuation_weights) or not self.continuation_ids:
            raise ShapeError(
                f"Group: expected one weight vector per continuation and at least one continuation, got "
                f"{len(self.continuation_ids)} continuations and {len(self.continuation_weights)} weight "
                "vectors."
            )
        pairs += zip(self.continuation_ids, self.continuation_weights, strict=True)
        for name, vectors in self.token_extras.items():
            if [vector.shape for vector in vectors] != [ids.shape for ids in self.continuation_ids]:
                raise ShapeError(
                    f"Group: expected token_extras {name!r} with one number per continuation token, "
                    f"{[len(ids) for ids in self.continuation_ids]}, got {[tuple(x.shape) for x in vectors]}."
                )
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
        token_extras: name -> float tensor [N], one value per scored row; zero in a scored prefix.
    """

    ids_T: Tensor
    positions_T: Tensor
    spans: tuple[Span, ...]
    rows_N: Tensor
    targets_N: Tensor
    weights_N: Tensor
    owner_N: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    token_extras: Mapping[str, Tensor] = field(default_factory=dict)

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
        extras, token_extras = (
            {name: value.to(device, non_blocking=True) for name, value in values.items()}
            for values in (self.extras, self.token_extras)
        )
        return replace(self, **move, extras=extras, token_extras=token_extras)


@final
@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        temperature: divides the logits, >= 0; 0 is greedy decoding, for evaluation only.
        top_p: smallest set of likeliest tokens with this much probability, in (0, 1]; 1 is all.
        top_k: this many likeliest tokens; 0 is all.
        max_new_tokens: of one completion, >= 1; fewer where the model's context ends.
        stop_ids: tokens that end a completion, of which they are a part.
        n: completions per prompt, >= 1.
        stop_strings: texts that end a completion with the token that completes them.

    Raises:
        ConfigError: a value out of range, or one without effect on greedy decoding.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 64
    stop_ids: tuple[int, ...] = ()
    n: int = 1
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        asked = {
            "temperature >= 0": 0 <= self.temperature < math.inf,
            "0 < top_p <= 1": 0 < self.top_p <= 1,
            "top_k >= 0": self.top_k >= 0,
            "max_new_tokens >= 1": self.max_new_tokens >= 1,
            "n >= 1": self.n >= 1,
            "no empty stop string": all(self.stop_strings),
        }
        failed = [rule for rule, holds in asked.items() if not holds]
        if failed:
            raise ConfigError(f"Sampling: expected {' and '.join(failed)}, got {self}.")
        if self.greedy and (self.warped or self.n > 1):
            raise ConfigError(
                f"Sampling: top_p, top_k and n have no effect at temperature 0, got {self}. Leave them out."
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken instead of drawing one."""
        return self.temperature == 0

    @property
    def warped(self) -> bool:
        """Whether tokens are cut away, so that temperature alone does not give the distribution."""
        return self.top_p < 1 or self.top_k > 0

    @property
    def can_stop(self) -> bool:
        """Whether anything but length ends a completion."""
        return bool(self.stop_ids or self.stop_strings)


@final
@dataclass(frozen=True, eq=False)
class Rollout:
    """One completion of one prompt, with everything that a policy loss needs. One row, no padding.

    Vectors over the completion have one element per token; what they hold where the policy did not
    sample (mask False) counts for nothing and may be NaN.

    Args:
        prompt_ids: int64 [P], P >= 1.
        completion_ids: int64 [L], L >= 1, the stop token included.
        mask: bool [L], True where the policy sampled the token; False for a tool's output, say.
        finished: whether the completion ended by itself; True where nothing could have ended it.
        score: reward of the whole completion; None for none.
        token_rewards: float [L], rewards of single tokens; None for none.
        old_logprobs: float [L], nats, under the policy before the update, at the sampling temperature.
        ref_logprobs: float [L], nats, under the reference, at the sampling temperature.
        sampler_logprobs: float [L], nats, as the sampler drew them, top-p and top-k included.
        values: float [L], value of the state before each token.
        end_value: value of the state after the last token.
        sampling: how it was drawn.
        info: further numbers and names: of the reward's members, of the source, ...

    Raises:
        ShapeError: vectors that do not fit, or no sampled token.
        NonFiniteError: a reward, log-probability or value that is NaN or infinite where it counts.
        ConfigError: greedy decoding, which explores nothing; or top-p and top-k without
            `sampler_logprobs`, since a trainer cannot work them out.
    """

    prompt_ids: Tensor
    completion_ids: Tensor
    mask: Tensor
    finished: bool
    score: float | None = None
    token_rewards: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    values: Tensor | None = None
    end_value: float | None = None
    sampling: Sampling = Sampling()
    info: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_tokens()
        for name in ("token_rewards", "old_logprobs", "ref_logprobs", "sampler_logprobs", "values"):
            self._check_vector(name, getattr(self, name))
        for name, number in (("score", self.score), ("end_value", self.end_value)):
            if number is not None and not math.isfinite(number):
                raise NonFiniteError(f"Rollout: expected a finite {name}, got {number}. None leaves it out.")
        if self.sampling.greedy:
            raise ConfigError(
                "Rollout: expected sampled tokens, got greedy decoding (temperature 0), which explores "
                "nothing. Sample with temperature=1.0."
            )
        if self.sampling.warped and self.sampler_logprobs is None:
            raise ConfigError(
                f"Rollout: expected sampler_logprobs with top_p={self.sampling.top_p} and "
                f"top_k={self.sampling.top_k}, got none; a trainer cannot work them out. "
                "Keep the sampler's log-probabilities, or sample with top_p=1.0 and top_k=0."
            )

    def _check_tokens(self) -> None:
        for name in ("prompt_ids", "completion_ids"):
            ids = getattr(self, name)
            if ids.ndim != 1 or ids.dtype != torch.int64 or len(ids) == 0:
                raise ShapeError(
                    f"Rollout: expected {name} as a vector of int64 with at least one token, got "
                    f"{tuple(ids.shape)} of {ids.dtype}."
                )
        if self.mask.dtype != torch.bool or self.mask.shape != self.completion_ids.shape:
            raise ShapeError(
                f"Rollout: expected mask as bool of shape {tuple(self.completion_ids.shape)}, got "
                f"{tuple(self.mask.shape)} of {self.mask.dtype}. True marks what the policy sampled."
            )
        if not bool(self.mask.any()):
            raise ShapeError("Rollout: expected at least one sampled token, got a mask that is all False.")

    def _check_vector(self, name: str, vector: Tensor | None) -> None:
        if vector is None:
            return
        if vector.shape != self.completion_ids.shape or not vector.is_floating_point():
            raise ShapeError(
                f"Rollout: expected {name} as floats of shape {tuple(self.completion_ids.shape)}, one per "
                f"completion token, got {tuple(vector.shape)} of {vector.dtype}."
            )
        counted = vector[self.mask]
        if not bool(counted.isfinite().all()):
            raise NonFiniteError(f"Rollout: expected finite {name} where the mask is True, got {counted}.")

    def __len__(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt_ids) + len(self.completion_ids)


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
