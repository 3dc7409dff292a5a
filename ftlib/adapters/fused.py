"""A LoRA projection as one function: no activation is widened, the input is saved once.

peft casts the *input* of an adapter up to the adapter's float32, for every projection and token. Here
the *adapter* is cast down to the input's dtype, its product is added in place, and the gradients go
back to the float32 weights. The module is peft's own `Linear` with another forward, made through peft's
registration of custom modules, so saving, merging and switching stay peft's. Whatever the fused form
does not cover (dropout, DoRA, several active adapters, merged or mixed dtypes) runs peft's forward.

Shapes: T rows, I input width, O output width, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

__all__ = ["FusedLoraLinear", "fuse"]


class FusedLoraLinear(PeftLoraLinear):
    """peft's LoRA linear layer, computed in one autograd function where that is exact."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., I] to [..., O], in the dtype of `x`."""
        name = self._fusable(x, args, kwargs)
        if name is None:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        base = self.get_base_layer()
        fused: Tensor = _LoraProjection.apply(
            x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )
        return fused

    def _fusable(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """The one active adapter that the fused form covers, or None."""
        if args or kwargs or self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant:
            return None
        (name,) = active
        base, dropout = self.get_base_layer(), self.lora_dropout[name]
        drops = isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0
        hooked = base._forward_hooks or base._forward_pre_hooks
        plain = _is_plain(base) and base.weight.dtype == x.dtype and not base.weight.requires_grad
        if drops or hooked or not plain or self.lora_bias[name] or torch.is_autocast_enabled(x.device.type):
            return None
        return str(name)


class _LoraProjection(torch.autograd.Function):
    """y = x W' + b + (x A') (sB)'

    With u = x A':  dB = s dy' u,  dA = (dy sB)' x,  dx = dy W + (dy sB) A.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_rI: Tensor,
        b_Or: Tensor,
        scale: float,
    ) -> Tensor:
        low_a_rI, low_b_Or = a_rI.to(x.dtype), (b_Or * scale).to(x.dtype)
        rows_TI = x.reshape(x.numel() // x.shape[-1], x.shape[-1])  # -1 is ambiguous where there are no rows
        inner_Tr = rows_TI @ low_a_rI.t()
        # The thin product first, and the large one added to it before rounding. The other way round a
        # change below half a unit in the last place of a bf16 output is lost: a fresh adapter moves by a
        # quarter less.
        output_TO = (inner_Tr @ low_b_Or.t()).addmm_(rows_TI, weight_OI.t())
        if bias_O is not None:
            output_TO += bias_O
        ctx.save_for_backward(rows_TI, weight_OI, low_a_rI, low_b_Or, inner_Tr)
        ctx.scale, ctx.wide = scale, a_rI.dtype
        return output_TO.view(*x.shape[:-1], len(weight_OI))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows_TI, weight_OI, low_a_rI, low_b_Or, inner_Tr = ctx.saved_tensors
        dy_TO = dy.reshape(len(rows_TI), dy.shape[-1])
        dinner_Tr = dy_TO @ low_b_Or
        da_rI = db_Or = dx = None
        if ctx.needs_input_grad[3]:
            da_rI = (dinner_Tr.t() @ rows_TI).to(ctx.wide)
        if ctx.needs_input_grad[4]:
            # (u' dy)' rather than dy' u: the thin matrix first is twice as fast
            db_Or = (inner_Tr.t() @ dy_TO).t().to(ctx.wide) * ctx.scale
        if ctx.needs_input_grad[0]:
            dx = (dinner_Tr @ low_a_rI).addmm_(dy_TO, weight_OI).view(*dy.shape[:-1], rows_TI.shape[-1])
        return dx, None, None, da_rI, db_Or, None


def fuse(config: PeftConfig) -> PeftConfig:
    """The configuration with the fused projection registered where it applies, else as it is.

    The registration lives in memory only: a saved adapter is plain peft.
    """
    if config.peft_type == PeftType.LORA and isinstance(config, LoraConfig) and not config.use_dora:
        config._register_custom_module({nn.Linear: _fused_or_none})  # type: ignore[dict-item]
    return config


def _fused_or_none(
    target: nn.Module, adapter_name: str, *, parameter_name: str | None = None, **options: Any
) -> FusedLoraLinear | None:
    """The fused layer around a plain matrix; None hands every other kind back to peft.

    peft asks by `isinstance`, which quantised layers pass too.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if parameter_name is not None or not _is_plain(base):
        return None
    return FusedLoraLinear(target, adapter_name, **options)


def _is_plain(base: nn.Module) -> bool:
    """Whether a layer is `nn.Linear` itself with an ordinary weight: no subclass, not quantised."""
    return type(base) is nn.Linear and type(base.weight) is nn.Parameter
