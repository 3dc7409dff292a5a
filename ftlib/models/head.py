"""Log-probabilities of given tokens from hidden states, without the logits of the whole batch.

For a scored row, with z = cap(W h + b) / temperature:

    logp = z[y] - logsumexp(z)
    d logp / dh = (W[y] cap'(y) - sum_v softmax(z)_v cap'(v) W[v]) / temperature

With a frozen head the forward computes both and keeps one vector per row, so the backward is a
scaling by whatever coefficient comes from above: two matrix products per row for any loss that is a
function of log-probabilities. A trainable head is recomputed in the backward (four products). A head
that is not one linear map (an adapter on it, say) runs as a module, chunk by chunk, recomputed.
Peak memory is one chunk of logits, whatever the number of rows.

Shapes: N scored rows, R rows of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from ftlib.errors import ConfigError, ShapeError

__all__ = ["Head", "HeadOutput", "head_logprobs"]

CHUNK = 256  # rows of logits held at once


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
        entropy_N: entropy of each row's distribution in nats, detached; or None.
    """

    logprobs_N: Tensor
    entropy_N: Tensor | None = None


def head_logprobs(
    head: Head, hidden_ND: Tensor, targets_N: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> HeadOutput:
    """Log-probabilities of `targets_N`, differentiable in the hidden states and in a trainable head.

    Args:
        head: of the model the states come from.
        hidden_ND: float [N, D].
        targets_N: int64 [N], below V.
        temperature: divides the logits, > 0.
        entropy: also return each row's entropy (no gradient; use `losses.entropy` for one).

    Raises:
        ShapeError: ranks or lengths that do not fit.
        ConfigError: a temperature that is not positive.

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
    if not head.linear:
        logprobs_N, entropy_N = _module_logprobs(head, hidden_ND, targets_N, temperature)
    else:
        matrix = cast(nn.Linear, head.module)
        logprobs_N, entropy_N = _LinearHead.apply(
            hidden_ND.to(matrix.weight.dtype),
            matrix.weight,
            matrix.bias,
            targets_N,
            head.scale,
            head.softcap,
            temperature,
            entropy,
        )
    return HeadOutput(logprobs_N, entropy_N if entropy else None)


def _module_logprobs(
    head: Head, hidden_ND: Tensor, targets_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    def chunk(hidden_RD: Tensor, targets_R: Tensor) -> tuple[Tensor, Tensor]:
        logits_RV = head.logits(hidden_RD, temperature=temperature)
        logprobs_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)).log_softmax(-1)
        entropy_R = -(logprobs_RV.exp() * logprobs_RV).sum(-1)
        return logprobs_RV.gather(-1, targets_R[:, None])[:, 0], entropy_R.detach()

    pieces = [
        checkpoint(chunk, hidden_RD, targets_R, use_reentrant=False)
        for hidden_RD, targets_R in zip(hidden_ND.split(CHUNK), targets_N.split(CHUNK), strict=True)
    ]
    logprobs, entropies = zip(*pieces, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def _chunk_probs(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
    out_RV: Tensor,
    entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One chunk: logprobs [R], unnormalised probabilities [R, V] (in `out_RV`), their sums [R], entropy.

    The row maximum is subtracted before the exponential, so the largest term is exactly one in any dtype.
    """
    wide = torch.promote_types(hidden_RD.dtype, torch.float32)
    scores_RV = torch.mm(hidden_RD, weight_VD.t(), out=out_RV)
    if bias_V is not None:
        scores_RV += bias_V
    if softcap is not None:
        scores_RV.mul_(scale / softcap).tanh_().mul_(softcap)
    factor = (1.0 if softcap is not None else scale) / temperature
    if factor != 1.0:
        scores_RV *= factor
    # the target's own logit by a float32 row product: the bf16 one carries 2 ** -9 relative error
    target_R = (hidden_RD.to(wide) * weight_VD[targets_R].to(wide)).sum(-1)
    if bias_V is not None:
        target_R += bias_V[targets_R].to(wide)
    if softcap is not None:
        target_R = torch.tanh(target_R * (scale / softcap)) * softcap
    target_R *= factor
    largest_R1 = scores_RV.amax(-1, keepdim=True)
    scores_RV.sub_(largest_R1)
    negative_R = None
    if entropy:
        shifted_RV = scores_RV.to(wide)
        negative_R = (shifted_RV.exp() * shifted_RV).sum(-1)
    scores_RV.exp_()
    sums_R = _row_sums(scores_RV, wide)
    # that logit replaces the rounded one in the sum too, so that no log-probability exceeds zero
    exact_R = torch.exp(target_R - largest_R1[:, 0].to(wide))
    sums_R += exact_R - scores_RV.gather(1, targets_R[:, None])[:, 0].to(wide)
    # indexed, because scatter_ copies all of a bf16 [R, V]
    rows_R = torch.arange(len(targets_R), device=targets_R.device)
    scores_RV[rows_R, targets_R] = exact_R.to(scores_RV.dtype)
    lse_R = largest_R1[:, 0].to(wide) + sums_R.log()
    entropy_R = None if negative_R is None else sums_R.log() - negative_R / sums_R
    return target_R - lse_R, scores_RV, sums_R, entropy_R


def _row_sums(x_RV: Tensor, wide: torch.dtype) -> Tensor:
    """Sums of rows in `wide`. A bf16 row is summed in runs, in float32 inside, and the runs in `wide`."""
    width = x_RV.shape[1]
    run = next((size for size in (256, 128, 64) if width % size == 0), 0)
    if x_RV.dtype is not torch.bfloat16 or not run:
        return x_RV.sum(-1, dtype=wide)
    return x_RV.view(len(x_RV), width // run, run).sum(-1).sum(-1, dtype=wide)


class _LinearHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        scale: float,
        softcap: float | None,
        temperature: float,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        rows = len(hidden_ND)
        logprobs_N = hidden_ND.new_empty(rows, dtype=wide)
        entropy_N = hidden_ND.new_empty(rows if entropy else 0, dtype=wide)
        trainable = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        keep = ctx.needs_input_grad[0] and not trainable
        grad_ND = torch.empty_like(hidden_ND) if keep else None
        scratch_RV = hidden_ND.new_empty(min(CHUNK, rows), len(weight_VD))
        for start in range(0, rows, CHUNK):
            part = slice(start, min(start + CHUNK, rows))
            hidden_RD, targets_R = hidden_ND[part], targets_N[part]
            logprobs_N[part], probs_RV, sums_R, entropy_R = _chunk_probs(
                hidden_RD,
                weight_VD,
                bias_V,
                targets_R,
                scale,
                softcap,
                temperature,
                scratch_RV[: len(hidden_RD)],
                entropy,
            )
            if entropy_R is not None:
                entropy_N[part] = entropy_R
            if grad_ND is not None:
                grad_ND[part] = _hidden_grad(
                    hidden_RD, weight_VD, bias_V, targets_R, probs_RV, sums_R, scale, softcap, temperature
                )
        ctx.mark_non_differentiable(entropy_N)
        ctx.options = (scale, softcap, temperature)
        if trainable:
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N)
        else:
            ctx.save_for_backward(grad_ND)
        ctx.trainable = trainable
        return logprobs_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.trainable:
            (grad_ND,) = ctx.saved_tensors
            return grad_ND * upstream_N[:, None].to(grad_ND.dtype), *[None] * 7
        hidden_ND, weight_VD, bias_V, targets_N = ctx.saved_tensors
        return *_recomputed_grads(upstream_N, hidden_ND, weight_VD, bias_V, targets_N, *ctx.options), *[
            None
        ] * 5


def _cap_slope(
    hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """cap'(z) = 1 - tanh(z / softcap)^2, [R, V]."""
    return 1 - torch.tanh(linear(hidden_RD, weight_VD, bias_V) * (scale / softcap)).square()


def _hidden_grad(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_R: Tensor,
    probs_RV: Tensor,
    sums_R: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
) -> Tensor:
    """Gradient d logp / dh of one chunk, [R, D]. Overwrites `probs_RV`."""
    wide = sums_R.dtype
    chosen_RD = weight_VD[targets_R].to(wide)
    if softcap is not None:
        slope_RV = _cap_slope(hidden_RD, weight_VD, bias_V, scale, softcap)
        probs_RV *= slope_RV
        chosen_RD = chosen_RD * slope_RV.gather(1, targets_R[:, None]).to(wide)
    mean_RD = torch.mm(probs_RV, weight_VD).to(wide) / sums_R[:, None]
    return ((chosen_RD - mean_RD) * (scale / temperature)).to(hidden_RD.dtype)


def _recomputed_grads(
    upstream_N: Tensor,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    scale: float,
    softcap: float | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the hidden states, weight and bias, from probabilities built again chunk by chunk."""
    rows = len(hidden_ND)
    wide = upstream_N.dtype
    dhidden_ND = torch.empty_like(hidden_ND)
    dweight_VD = torch.zeros_like(weight_VD, dtype=wide)
    dbias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=wide)
    scratch_RV = hidden_ND.new_empty(min(CHUNK, rows), len(weight_VD))
    for start in range(0, rows, CHUNK):
        part = slice(start, min(start + CHUNK, rows))
        hidden_RD, targets_R = hidden_ND[part], targets_N[part]
        _, probs_RV, sums_R, _ = _chunk_probs(
            hidden_RD,
            weight_VD,
            bias_V,
            targets_R,
            scale,
            softcap,
            temperature,
            scratch_RV[: len(hidden_RD)],
            False,
        )
        # d loss / d logits = c (onehot - p) cap' scale / temperature
        coefficient_R1 = upstream_N[part, None] * (scale / temperature)
        dlogits_RV = probs_RV.mul_((-coefficient_R1 / sums_R[:, None]).to(probs_RV.dtype))
        rows_R = torch.arange(len(targets_R), device=targets_R.device)
        dlogits_RV[rows_R, targets_R] += coefficient_R1[:, 0].to(dlogits_RV.dtype)
        if softcap is not None:
            dlogits_RV *= _cap_slope(hidden_RD, weight_VD, bias_V, scale, softcap)
        dhidden_ND[part] = torch.mm(dlogits_RV, weight_VD)
        dweight_VD += torch.mm(dlogits_RV.t(), hidden_RD)
        if dbias_V is not None:
            dbias_V += dlogits_RV.sum(0, dtype=wide)
    return (
        dhidden_ND,
        dweight_VD.to(weight_VD.dtype),
        None if bias_V is None or dbias_V is None else dbias_V.to(bias_V.dtype),
    )
