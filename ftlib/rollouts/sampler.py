"""What a sampler is: prompts in, completions with their log-probabilities out.

Token ids end to end: a completion is never decoded and tokenised again. Random numbers are keyed by
(seed, iteration, prompt, sample), so that a completion depends neither on its batch nor on its rank.

Shapes: L tokens of one completion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, final

import numpy as np
import torch
from torch import Tensor, nn

from ftlib.batches import Sampling
from ftlib.errors import ConfigError, ShapeError

__all__ = ["FunctionSampler", "Sampled", "Sampler", "StopReason", "prompt_seeds"]

StopReason = Literal["stop_id", "stop_string", "length"]


@final
@dataclass(frozen=True, eq=False)
class Sampled:
    """One completion as a sampler gives it, on the CPU.

    Args:
        ids: int64 [L], L >= 1, the stop token included.
        mask: bool [L], True where the model drew the token.
        finished: whether it ended by itself; True where nothing could have ended it.
        stop_reason: what ended it: a stop id, a stop string, or the number of tokens.
        logprobs: float [L], nats, of the distribution drawn from: temperature, top-p and top-k
            included; None where the sampler keeps none.
        version: of the weights that wrote it, as `Sampler.sync` was told.

    Raises:
        ShapeError: vectors that do not fit, or no token.
    """

    ids: Tensor
    mask: Tensor
    finished: bool
    stop_reason: StopReason
    logprobs: Tensor | None = None
    version: int = 0

    def __post_init__(self) -> None:
        if self.ids.ndim != 1 or self.ids.dtype != torch.int64 or len(self.ids) == 0:
            raise ShapeError(
                f"Sampled: expected ids as a vector of int64 with at least one token, got "
                f"{tuple(self.ids.shape)} of {self.ids.dtype}."
            )
        if self.mask.shape != self.ids.shape or self.mask.dtype != torch.bool:
            raise ShapeError(
                f"Sampled: expected mask as bool of shape {tuple(self.ids.shape)}, got "
                f"{tuple(self.mask.shape)} of {self.mask.dtype}."
            )
        if self.logprobs is not None and self.logprobs.shape != self.ids.shape:
            raise ShapeError(
                f"Sampled: expected one log-probability per token, {len(self.ids)} in all, got "
                f"{tuple(self.logprobs.shape)}."
            )

    @classmethod
    def of(
        cls,
        ids: Sequence[int],
        sampling: Sampling,
        *,
        stop_string: bool = False,
        logprobs: Tensor | None = None,
        version: int = 0,
    ) -> Sampled:
        """A completion that the model drew whole: what ended it is read from its last token.

        Args:
            ids: with the stop token, if there is one.
            sampling: gives the stop ids.
            stop_string: a stop string ended it.
            logprobs: one per token.
            version: of the weights.
        """
        ids_L = torch.as_tensor(ids, dtype=torch.int64)
        stopped = len(ids_L) > 0 and int(ids_L[-1]) in sampling.stop_ids
        reason: StopReason = "stop_id" if stopped else "stop_string" if stop_string else "length"
        finished = reason != "length" or not sampling.can_stop
        mask_L = torch.ones(len(ids_L), dtype=torch.bool)
        return cls(ids_L, mask_L, finished, reason, logprobs, version)


class Sampler(Protocol):
    """Draws completions from a policy that changes."""

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, seed: int | Sequence[int]
    ) -> list[Sampled]:
        """`sampling.n` completions of each prompt, those of one prompt next to each other.

        Args:
            prompt_ids: token ids, at least one each.
            sampling: how to draw.
            seed: one number for the call, or one per prompt (`prompt_seeds`).
        """

    def sync(self, policy: nn.Module, version: int) -> None:
        """Draw from these weights from now on."""


def prompt_seeds(seed: int, iteration: int, prompts: Sequence[int]) -> list[int]:
    """One seed per prompt, from its place in the whole batch: the same on every rank and in every batch.

    Args:
        seed: of the run, >= 0.
        iteration: how many times the policy was sampled before, >= 0.
        prompts: place of each prompt in the batch over all ranks, >= 0.

    Example:
        >>> both = prompt_seeds(0, 7, [0, 1])
        >>> both == prompt_seeds(0, 7, [0]) + prompt_seeds(0, 7, [1])
        True
    """
    keys = [np.random.SeedSequence((seed, iteration, prompt)) for prompt in prompts]
    return [int(key.generate_state(1, np.uint64)[0] >> 1) for key in keys]  # 63 bits: engines take int64


def seeds_of(seed: int | Sequence[int], prompts: int) -> list[int]:
    """A sampler's `seed` argument as one seed per prompt."""
    if isinstance(seed, int):
        return prompt_seeds(seed, 0, range(prompts))
    if len(seed) != prompts:
        raise ConfigError(f"generate: expected one seed, or one per prompt ({prompts}), got {len(seed)}.")
    return list(seed)


Drawn = Sequence["Sampled | Sequence[int]"]


@final
class FunctionSampler:
    """Any function that completes prompts, as a sampler.

    Args:
        function: takes (prompt_ids, sampling, seeds), one seed per prompt; returns `sampling.n`
            completions per prompt, each a `Sampled` or its token ids.
        sync: called with (policy, version) when the policy changes; None where the function sees the
            policy itself.

    Example:
        >>> sampler = FunctionSampler(lambda prompts, sampling, seeds: [[7, 2] for _ in prompts])
        >>> sampler.generate([[5, 6]], Sampling(stop_ids=(2,)), 0)[0].finished
        True
    """

    def __init__(
        self,
        function: Callable[[Sequence[Sequence[int]], Sampling, Sequence[int]], Drawn],
        *,
        sync: Callable[[nn.Module, int], None] | None = None,
    ) -> None:
        self._function, self._sync = function, sync
        self._version = 0

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, seed: int | Sequence[int]
    ) -> list[Sampled]:
        """See `Sampler.generate`.

        Raises:
            ShapeError: not `sampling.n` completions per prompt.
        """
        drawn = self._function(prompt_ids, sampling, seeds_of(seed, len(prompt_ids)))
        if len(drawn) != len(prompt_ids) * sampling.n:
            raise ShapeError(
                f"FunctionSampler: expected {sampling.n} completions of each of {len(prompt_ids)} prompts, "
                f"got {len(drawn)} in all."
            )
        return [
            row if isinstance(row, Sampled) else Sampled.of(row, sampling, version=self._version)
            for row in drawn
        ]

    def sync(self, policy: nn.Module, version: int) -> None:
        """See `Sampler.sync`."""
        self._version = version
        if self._sync is not None:
            self._sync(policy, version)
