"""Log-probabilities of given tokens from hidden states, without the logits of the whole batch.

A head that is one matrix goes through `linear_head.py`. One that is not (an adapter on it, say) runs as a
module, chunk by chunk, recomputed in the backward. Peak memory is one chunk of logits, whatever the number of
rows.

Shapes: N scored rows, R rows of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftlib.errors import ConfigError, ShapeError
from ftlib.losses import entropy as entropy_of
from ftlib.models.linear_head import CHUNK, Entropy, linear_logprobs

__all__ = ["Entropy", "Head", "HeadOutput", "head_logprobs"]


@final
@dataclass(frozen=True, eq=False)
class Head:
    """The map from hidden states to logits of one model.

    Args:
        module: the output embedding; anything from [R, D] to [R, V].
        softcap: logits become ``softcap * tanh(logits / softcap)``; None for none.
        scale: factor on the logits.
    """

    module: nn.Module
    softcap: float | None = None
    scale: float = 1.0

    @property
    def linear(self) -> bool:
        """Whether the module is one plain matrix (with or without bias)."""
        return type(self.module) is nn.Linear

    def logits(self, hidden_RD: Tensor, *, temperature: float = 1.0) -> Tensor:
        """[R, V], in the dtype of the module."""
        logits: Tensor = self.module(hidden_RD)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits if temperature == 1.0 else logits / temperature


@final
@dataclass(frozen=True, eq=False)
class HeadOutput:
    """What the head says of N rows. `entropy_N` only where it was asked for.

    Args:
        logprobs_N: log-probability of each target in nats, at least float32.
        entropy_N: entropy of each row's distribution in nats, at least float32; or None. Detached, unless
            its gradient was asked for.
    """

    logprobs_N: Tensor
    entropy_N: Tensor | None = None


def head_logprobs(
    head: Head, hidden_ND: Tensor, targets_N: Tensor, *, temperature: float = 1.0, entropy: Entropy = False
) -> HeadOutput:
    """Log-probabilities of `targets_N`, differentiable in the hidden states and in a trainable head.

    Args:
        head: of the model the states come from.
        hidden_ND: float [N, D].
        targets_N: int64 [N], below V.
        temperature: divides the logits, > 0.
        entropy: also return each row's entropy; "gradient" makes it differentiable as well, at the price
            of one more matrix product where the head is frozen.

    Raises:
        ShapeError: ranks or lengths that do not fit.
        ConfigError: a temperature that is not positive, or another word for the entropy.

    Source: the gradient identity is that of the log-softmax; keeping it instead of logits follows
    the fused linear cross-entropy of Hsu et al. 2024 (Liger kernel, arXiv:2410.10989, section 3.2).
    """
    if hidden_ND.ndim != 2 or targets_N.shape != hidden_ND.shape[:1]:
        raise ShapeError(
            f"head_logprobs: expected hidden [N, D] and targets [N], got {tuple(hidden_ND.shape)} and "
            f"{tuple(targets_N.shape)}."
        )
    if not temperature > 0:
        raise ConfigError(f"head_logprobs: expected a temperature > 0, got {temperature}.")
    if entropy not in (False, True, "gradient"):
        raise ConfigError(f"head_logprobs: expected entropy False, True or 'gradient', got {entropy!r}.")
    if not head.linear:
        return _module_output(head, hidden_ND, targets_N, temperature, entropy)
    logprobs_N, entropy_N = linear_logprobs(
        cast(nn.Linear, head.module),
        hidden_ND,
        targets_N,
        scale=head.scale,
        softcap=head.softcap,
        temperature=temperature,
        entropy=entropy,
    )
    return HeadOutput(logprobs_N, entropy_N if entropy else None)


def _module_output(
    head: Head, hidden_ND: Tensor, targets_N: Tensor, temperature: float, entropy: Entropy
) -> HeadOutput:
    def chunk(hidden_RD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor | None]:
        logits_RV = head.logits(hidden_RD, temperature=temperature)
        logprobs_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)).log_softmax(-1)
        chosen_R = logprobs_RV.gather(-1, targets_R[:, None])[:, 0]
        if not entropy:
            return chosen_R, None
        return chosen_R, entropy_of(logprobs_RV if entropy == "gradient" else logprobs_RV.detach())

    pieces = [
        checkpoint(chunk, hidden_RD, targets_R, use_reentrant=False)
        for hidden_RD, targets_R in zip(hidden_ND.split(CHUNK), targets_N.split(CHUNK), strict=True)
    ]
    logprobs, entropies = zip(*pieces, strict=True)
    return HeadOutput(torch.cat(logprobs), torch.cat(entropies) if entropy else None)
