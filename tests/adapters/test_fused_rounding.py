"""A young adapter changes outputs by less than a bf16 rounding step; the sum must not swallow it."""

from __future__ import annotations

import torch

from ftlib.adapters.fused import _LoraProjection


def test_a_change_below_half_a_bf16_step_survives_in_the_mean():
    """The projection of (y - W x) on the adapter's exact output is 1 when nothing is lost.

    Rounded first and added after, as peft does under autocast, the share that survives is below 0.9.
    """
    x_TI, weight_OI = torch.randn(256, 128).bfloat16(), (torch.randn(64, 128) * 0.1).bfloat16()
    a_rI, b_Or = torch.randn(8, 128) * 0.05, torch.randn(64, 8) * 1e-3
    base_TO = x_TI.double() @ weight_OI.double().t()
    delta_TO = x_TI.double() @ a_rI.double().t() @ b_Or.double().t()

    def surviving(y_TO: torch.Tensor) -> float:
        return float(((y_TO.double() - base_TO) * delta_TO).sum() / delta_TO.square().sum())

    fused_TO = _LoraProjection.apply(x_TI, weight_OI, None, a_rI, b_Or, 1.0)
    rounded_TO = (x_TI @ weight_OI.t()) + delta_TO.bfloat16()
    assert abs(surviving(fused_TO) - 1) < 0.05
    assert surviving(rounded_TO) < 0.9
