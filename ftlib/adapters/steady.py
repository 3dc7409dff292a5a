"""bitsandbytes' linear layers that compute the same in training and in evaluation. Needs bitsandbytes.

On a CPU these layers compute in two ways: in evaluation mode an int8 layer rounds its input to int8 as
well, and a 4-bit one repacks its weight for a bfloat16 kernel without a gradient. A reference, computed in
evaluation mode, would then differ from its policy, and training after an evaluation would lose gradients.
Here both keep the way of training. They hold no dropout, so the mode means nothing else to them.

Shapes: I input width, O output width.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from torch import Tensor

__all__ = ["SteadyLinear4bit", "SteadyLinear8bit"]


class SteadyLinear4bit(Linear4bit):
    """A 4-bit layer that stays in training mode."""

    weight: Any  # a parameter of a kind of its own

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002  the mode is not taken over
        """Change nothing."""
        super().train(True)
        return self

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The weight that is computed with, [O, I]."""
        weight: Tensor = dequantize_4bit(self.weight.data, self.weight.quant_state)
        return weight.to(dtype)


class SteadyLinear8bit(Linear8bitLt):
    """An int8 layer that stays in training mode."""

    weight: Any  # a parameter of a kind of its own
    state: Any

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002  the mode is not taken over
        """Change nothing."""
        super().train(True)
        return self

    def init_8bit_state(self) -> None:
        """Take the scales over from the weight, unless it is a copy that has none, such as peft makes."""
        if self.weight.SCB is None and self.state.SCB is not None:
            self.weight.CB = None
        else:
            super().init_8bit_state()

    def plain(self, dtype: torch.dtype) -> Tensor:
        """The weight that is computed with, [O, I]."""
        if self.weight.CB is not None:  # not run yet
            self.init_8bit_state()
        scale_O = self.state.SCB / 127.0
        rounded_OI: Tensor = self.state.CB.to(dtype)
        return rounded_OI.mul_(scale_O[:, None])
