"""One token per row from its logits, with the log-probability it was drawn with.

    z = warp(logits / T),   p = softmax(z),   token = the first v with p_0 + ... + p_v > u

u is uniform in [0, 1) and the row's own, so a row's token depends on no other row. transformers' warpers
cut the tails.

Shapes: R rows, V vocabulary, N tokens of a stream.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from ftlib.batches import Sampling

__all__ = ["draw", "uniforms"]


def uniforms(seed: int, sample: int, count: int) -> Tensor:
    """The stream of one sample of one prompt: float32 [N] in [0, 1).

    Args:
        seed: of the prompt, >= 0.
        sample: which of its samples, from 0.
        count: N; a longer stream begins with the shorter one.
    """
    return torch.from_numpy(np.random.default_rng((seed, sample)).random(count, dtype=np.float32))


def draw(logits_RV: Tensor, sampling: Sampling, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens int64 [R] and their log-probabilities, nats, at least float32 [R].

    NaN logits give a NaN log-probability.

    Args:
        logits_RV: float [R, V].
        sampling: temperature, top-p and top-k. Greedy takes the likeliest, and its log-probability is
            that at temperature 1.
        uniform_R: float32 [R] in [0, 1).
    """
    scores_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    if sampling.greedy:
        tokens_R1 = scores_RV.argmax(-1, keepdim=True)
        return tokens_R1[:, 0], scores_RV.log_softmax(-1).gather(-1, tokens_R1)[:, 0]
    scores_RV = _warped(scores_RV / sampling.temperature, sampling)
    scores_RV = scores_RV - scores_RV.amax(-1, keepdim=True)
    below_RV = scores_RV.exp().cumsum(-1)
    sum_R1 = below_RV[
        :, -1:
    ]  # of the terms as added up: u < 1 stays below it, so the last token can be drawn
    tokens_R1 = torch.searchsorted(below_RV, uniform_R[:, None].to(sum_R1) * sum_R1, right=True)
    tokens_R1 = tokens_R1.clamp(max=logits_RV.shape[-1] - 1)  # NaN compares with nothing
    return tokens_R1[:, 0], (scores_RV.gather(-1, tokens_R1) - sum_R1.log())[:, 0]


def _warped(scores_RV: Tensor, sampling: Sampling) -> Tensor:
    """-inf for the tokens that top-k, then top-p, cut away."""
    none = torch.empty(0, dtype=torch.long, device=scores_RV.device)  # the warpers look at no earlier token
    if sampling.top_k > 0:
        scores_RV = TopKLogitsWarper(sampling.top_k)(none, scores_RV)
    if sampling.top_p < 1:
        scores_RV = TopPLogitsWarper(sampling.top_p)(none, scores_RV)
    return scores_RV
