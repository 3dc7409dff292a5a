"""Hand-made rollouts of one prompt, and the numbers that `prepare` makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ftlib.batches import Rollout
from ftlib.objectives.ppo import Prepared

__all__ = ["ASK", "column", "drawn", "rollout"]

ASK = (5, 6)  # ids of the prompt
Numbers = Sequence[float] | Tensor


def _vector(numbers: Numbers | None) -> Tensor | None:
    return None if numbers is None else torch.as_tensor(numbers, dtype=torch.float32)


def rollout(
    *,
    old: Numbers = (-1.0, -1.0, -1.0),
    ref: Numbers | None = None,
    values: Numbers | None = None,
    token_rewards: Numbers | None = None,
    sampler: Numbers | None = None,
    mask: Sequence[int] | None = None,
    ids: Sequence[int] | None = None,
    prompt: Sequence[int] = ASK,
    finished: bool = True,
    score: float | None = 0.0,
    **others: Any,
) -> Rollout:
    """One completion of as many tokens as `old` has numbers; without `ref`, the reference agrees."""
    length = len(old)
    return Rollout(
        torch.tensor(list(prompt)),
        torch.arange(10, 10 + length) if ids is None else torch.tensor(list(ids)),
        torch.ones(length, dtype=torch.bool) if mask is None else torch.tensor(mask).bool(),
        finished,
        score=score,
        token_rewards=_vector(token_rewards),
        old_logprobs=_vector(old),
        ref_logprobs=_vector(old if ref is None else ref),
        sampler_logprobs=_vector(sampler),
        values=_vector([0.0] * length if values is None else values),
        **others,
    )


def column(prepared: Prepared, name: str, row: int = 0) -> Tensor:
    """The numbers of one row, [L]."""
    numbers: Tensor = prepared.rows[row][name][0]
    return numbers


def drawn(seed: int, length: int) -> dict[str, Tensor]:
    """Random log-probabilities and values of a completion, for the arguments of `rollout`."""
    generator = torch.Generator().manual_seed(seed)
    old, ref, values = torch.randn(3, length, generator=generator)
    return {"old": -old.abs(), "ref": -ref.abs(), "values": values}
