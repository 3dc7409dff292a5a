"""A head that is one matrix, as one autograd function: log-probabilities and entropies without all logits.

For a scored row, with z = cap(scale W h + b) / temperature and p = softmax(z):

    logp = z[y] - logsumexp(z)             d logp / dz_v = [v = y] - p_v
    H = -sum_v p_v log p_v                 d H / dz_v = -p_v (log p_v + H)

and dz_v / dh = scale cap'(v) W[v] / temperature. With a frozen head the forward computes the gradients
too and keeps one vector per row and quantity, so the backward is a scaling by whatever coefficients come
from above: two matrix products per row for any loss that is a function of log-probabilities, a third
where the entropy's gradient is asked for. A trainable head is recomputed in the backward (four
products).

Shapes: N scored rows, R rows of a chunk, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

__all__ = ["CHUNK", "Entropy", "linear_logprobs"]

CHUNK = 256  # rows of logits held at once

Entropy = bool | Literal["gradient"]  # none, its value alone, or a value that carries gradient


def linear_logprobs(
    matrix: nn.Linear,
    hidden_ND: Tensor,
    targets_N: Tensor,
    *,
    scale: float,
    softcap: float | None,
    temperature: float,
    entropy: Entropy,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the targets, and entropies where asked for (else empty), each float [N].

    Args:
        matrix: the head.
        hidden_ND: float [N, D].
        targets_N: int64 [N], below V.
        scale: factor on the logits.
        softcap: of the logits; None for none.
        temperature: divides the logits, > 0.
        entropy: see `head.head_logprobs`.
    """
    if not torch.is_grad_enabled():
        hidden_ND = hidden_ND.detach()  # needs_input_grad of a Function does not heed no_grad
    pair: tuple[Tensor, Tensor] = _LinearHead.apply(
        hidden_ND.to(matrix.weight.dtype),
        matrix.weight,
        matrix.bias,
        targets_N,
        scale,
        softcap,
        temperature,
        entropy,
    )
    return pair


@final
@dataclass(frozen=True, eq=False)
class _Chunk:
    """R rows that met a linear head. The next chunk overwrites `probs_RV`.

    Args:
        part: which rows they are.
        logprobs_R: of their targets, at least float32.
        probs_RV: probabilities times `sums_R`, in the dtype of the states; the largest is one.
        sums_R: at least float32.
        slope_RV: cap' at each logit; None without a softcap, or where it was not asked for.
    """

    part: slice
    hidden_RD: Tensor
    targets_R: Tensor
    logprobs_R: Tensor
    probs_RV: Tensor
    sums_R: Tensor
    slope_RV: Tensor | None


@final
@dataclass(frozen=True, eq=False)
class _Linear:
    """A head that is one matrix, and the gradients of what it says."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None
    temperature: float

    def chunks(self, hidden_ND: Tensor, targets_N: Tensor, *, slope: bool) -> Iterator[_Chunk]:
        """All rows in order, in one [R, V] of memory; with cap' if its gradient will be wanted."""
        rows = len(hidden_ND)
        scratch_RV = hidden_ND.new_empty(min(CHUNK, rows), len(self.weight_VD))
        for start in range(0, rows, CHUNK):
            part = slice(start, min(start + CHUNK, rows))
            yield self._chunk(part, hidden_ND[part], targets_N[part], scratch_RV[: part.stop - start], slope)

    def _chunk(
        self, part: slice, hidden_RD: Tensor, targets_R: Tensor, out_RV: Tensor, slope: bool
    ) -> _Chunk:
        """The row maximum is subtracted before the exponential, so the largest term is one in any dtype."""
        wide = torch.promote_types(hidden_RD.dtype, torch.float32)
        scores_RV = torch.mm(hidden_RD, self.weight_VD.t(), out=out_RV)
        # the target's own logit by a float32 row product: the bf16 one carries 2 ** -9 relative error
        target_R = (hidden_RD.to(wide) * self.weight_VD[targets_R].to(wide)).sum(-1)
        if self.bias_V is not None:
            scores_RV += self.bias_V
            target_R += self.bias_V[targets_R].to(wide)
        slope_RV = None
        if self.softcap is not None:
            scores_RV.mul_(self.scale / self.softcap).tanh_()
            slope_RV = 1 - scores_RV.square() if slope else None
            scores_RV.mul_(self.softcap)
            target_R = torch.tanh(target_R * (self.scale / self.softcap)) * self.softcap
        factor = (1.0 if self.softcap is not None else self.scale) / self.temperature
        if factor != 1.0:
            scores_RV *= factor
            target_R *= factor
        largest_R1 = scores_RV.amax(-1, keepdim=True)
        scores_RV.sub_(largest_R1).exp_()
        sums_R = _row_sums(scores_RV, wide)
        # that logit replaces the rounded one in the sum too, so that no log-probability exceeds zero
        exact_R = torch.exp(target_R - largest_R1[:, 0].to(wide))
        sums_R += exact_R - scores_RV.gather(1, targets_R[:, None])[:, 0].to(wide)
        # indexed, because scatter_ copies all of a bf16 [R, V]
        rows_R = torch.arange(len(targets_R), device=targets_R.device)
        scores_RV[rows_R, targets_R] = exact_R.to(scores_RV.dtype)
        logprobs_R = target_R - (largest_R1[:, 0].to(wide) + sums_R.log())
        return _Chunk(part, hidden_RD, targets_R, logprobs_R, scores_RV, sums_R, slope_RV)

    def logprob_grad(self, chunk: _Chunk) -> Tensor:
        """Gradient d logp / dh of a chunk, at least float32 [R, D]. Overwrites its probabilities."""
        chosen_RD = self.weight_VD[chunk.targets_R].to(chunk.sums_R.dtype)
        if chunk.slope_RV is not None:
            chosen_RD *= chunk.slope_RV.gather(1, chunk.targets_R[:, None])
            chunk.probs_RV.mul_(chunk.slope_RV)
        mean_RD = torch.mm(chunk.probs_RV, self.weight_VD) / chunk.sums_R[:, None]
        return (chosen_RD - mean_RD) * (self.scale / self.temperature)

    def entropy_grad(self, chunk: _Chunk, dscores_RV: Tensor) -> Tensor:
        """Gradient d H / dh of a chunk, [R, D], from d H / dz."""
        dscores_RV = dscores_RV.to(self.weight_VD.dtype)
        if chunk.slope_RV is not None:
            dscores_RV = dscores_RV * chunk.slope_RV
        return torch.mm(dscores_RV, self.weight_VD) * (self.scale / self.temperature)

    def grads(
        self, hidden_ND: Tensor, targets_N: Tensor, dlogprobs_N: Tensor, dentropy_N: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of the hidden states, weight and bias, from probabilities built again by chunks."""
        wide = dlogprobs_N.dtype
        dhidden_ND = torch.empty_like(hidden_ND)
        dweight_VD = torch.zeros_like(self.weight_VD, dtype=wide)
        dbias_V = None if self.bias_V is None else torch.zeros_like(self.bias_V, dtype=wide)
        for chunk in self.chunks(hidden_ND, targets_N, slope=True):
            dentropy_R = None if dentropy_N is None else dentropy_N[chunk.part]
            dlogits_RV = self._dlogits(chunk, dlogprobs_N[chunk.part], dentropy_R)
            dhidden_ND[chunk.part] = torch.mm(dlogits_RV, self.weight_VD)
            dweight_VD += torch.mm(dlogits_RV.t(), chunk.hidden_RD)
            if dbias_V is not None:
                dbias_V += dlogits_RV.sum(0, dtype=wide)
        return (
            dhidden_ND,
            dweight_VD.to(self.weight_VD.dtype),
            None if self.bias_V is None or dbias_V is None else dbias_V.to(self.bias_V.dtype),
        )

    def _dlogits(self, chunk: _Chunk, dlogprobs_R: Tensor, dentropy_R: Tensor | None) -> Tensor:
        """Gradient d loss / d (W h + b) of a chunk, [R, V], in place of its probabilities."""
        factor = self.scale / self.temperature
        coefficient_R1 = dlogprobs_R[:, None] * factor
        spread_RV = None
        if dentropy_R is not None:
            _, spread_RV = _entropy(chunk.probs_RV, chunk.sums_R.dtype)
            spread_RV *= dentropy_R[:, None] * factor
        dlogits_RV = chunk.probs_RV
        dlogits_RV *= (-coefficient_R1 / chunk.sums_R[:, None]).to(dlogits_RV.dtype)
        rows_R = torch.arange(len(dlogprobs_R), device=dlogprobs_R.device)
        dlogits_RV[rows_R, chunk.targets_R] += coefficient_R1[:, 0].to(dlogits_RV.dtype)
        if spread_RV is not None:
            dlogits_RV += spread_RV
        if chunk.slope_RV is not None:
            dlogits_RV *= chunk.slope_RV
        return dlogits_RV


def _row_sums(x_RV: Tensor, wide: torch.dtype) -> Tensor:
    """Sums of rows in `wide`. A bf16 row is summed in runs, in float32 inside, and the runs in `wide`."""
    width = x_RV.shape[1]
    run = next((size for size in (256, 128, 64) if width % size == 0), 0)
    if x_RV.dtype is not torch.bfloat16 or not run:
        return x_RV.sum(-1, dtype=wide)
    return x_RV.view(len(x_RV), width // run, run).sum(-1).sum(-1, dtype=wide)


def _entropy(weights_RV: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Entropy of p = weights / sum(weights), [R], and its gradient in log weights, [R, V], both in `wide`.

        H = log sum(weights) - m,    dH / d log weights_v = p_v (m - log weights_v),    m = E_p[log weights]

    A weight of zero adds nothing to either.
    """
    weights_RV = weights_RV.to(wide)
    total_R1 = weights_RV.sum(-1, keepdim=True)
    weighted_RV = (weights_RV + torch.finfo(wide).tiny).log_().mul_(weights_RV)
    mean_R1 = weighted_RV.sum(-1, keepdim=True) / total_R1
    grad_RV = weighted_RV.mul_(-1 / total_R1).addcmul_(weights_RV, mean_R1 / total_R1)
    return (total_R1.log() - mean_R1)[:, 0], grad_RV


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
        entropy: Entropy,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        rows = len(hidden_ND)
        logprobs_N = hidden_ND.new_empty(rows, dtype=wide)
        entropy_N = hidden_ND.new_empty(rows if entropy else 0, dtype=wide)
        trainable = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        keep = ctx.needs_input_grad[0] and not trainable
        grad_ND = torch.empty_like(hidden_ND) if keep else None
        entropy_grad_ND = torch.empty_like(hidden_ND) if keep and entropy == "gradient" else None
        linear = _Linear(weight_VD, bias_V, scale, softcap, temperature)
        for chunk in linear.chunks(hidden_ND, targets_N, slope=keep):
            logprobs_N[chunk.part] = chunk.logprobs_R
            if entropy:
                entropy_N[chunk.part], dscores_RV = _entropy(chunk.probs_RV, wide)
                if entropy_grad_ND is not None:
                    entropy_grad_ND[chunk.part] = linear.entropy_grad(chunk, dscores_RV)
            if grad_ND is not None:
                grad_ND[chunk.part] = linear.logprob_grad(chunk)
        ctx.options = (scale, softcap, temperature)
        ctx.differentiable = entropy == "gradient"
        if not ctx.differentiable:
            ctx.mark_non_differentiable(entropy_N)
        ctx.trainable = trainable
        if trainable:
            ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N)
        else:
            ctx.save_for_backward(grad_ND, entropy_grad_ND)
        return logprobs_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogprobs_N: Tensor, dentropy_N: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.trainable:
            hidden_ND, weight_VD, bias_V, targets_N = ctx.saved_tensors
            linear = _Linear(weight_VD, bias_V, *ctx.options)
            asked_N = dentropy_N if ctx.differentiable else None
            return *linear.grads(hidden_ND, targets_N, dlogprobs_N, asked_N), *[None] * 5
        grad_ND, entropy_grad_ND = ctx.saved_tensors
        dhidden_ND = grad_ND * dlogprobs_N[:, None].to(grad_ND.dtype)
        if entropy_grad_ND is not None:
            dhidden_ND += entropy_grad_ND * dentropy_N[:, None].to(grad_ND.dtype)
        return dhidden_ND, *[None] * 7
