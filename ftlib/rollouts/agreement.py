"""How well a sampler's log-probabilities agree with the trainer's own.

    gap = mean |log pi_old - log mu|,   ratio = mean exp |log pi_old - log mu|,   over sampled tokens

Two programs, or two orders of the same sums, give two distributions; past a ratio of about 1.1 the
completions are hardly the policy's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ftlib.batches import Mean, Rollout
from ftlib.errors import ShapeError

__all__ = ["sampler_agreement"]


def sampler_agreement(rollouts: Sequence[Rollout]) -> dict[str, Mean]:
    """The means "sampler_gap", nats, and "sampler_ratio" over the sampled tokens of all rows.

    Args:
        rollouts: with `old_logprobs`; rows without `sampler_logprobs` count for nothing. Of rows drawn
            with top-p or top-k, what the tails held is part of the gap.

    Raises:
        ShapeError: a row without `old_logprobs`.
    """
    gaps = [torch.zeros(0)]
    for row in rollouts:
        if row.old_logprobs is None:
            raise ShapeError("sampler_agreement: expected old_logprobs in every rollout, got none in one.")
        if row.sampler_logprobs is not None:
            gaps.append((row.old_logprobs - row.sampler_logprobs)[row.mask].abs().float())
    gap_T = torch.cat(gaps)
    count = torch.tensor(float(len(gap_T)))
    return {"sampler_gap": Mean(gap_T.sum(), count), "sampler_ratio": Mean(gap_T.exp().sum(), count)}
