"""bitsandbytes' linear layers that compute the same in training and in evaluation. Needs bitsandbytes.

On a CPU these layers compute in two ways: in evaluation mode an int8 layer rounds its input to int8 as
well, and a 4-bit one repacks its weight for a bfloat16 kernel without a gradient. A reference, computed in
evaluation mode, would then differ from its policy, and training after an evaluation would lose gradients.
Here both keep the way of training. They hold no dropout, so the mode means nothing else to them.
"""

from __future__ import annotations

from typing import Self

import bitsandbytes as bnb

__all__ = ["SteadyLinear4bit", "SteadyLinear8bit"]


class SteadyLinear4bit(bnb.nn.Linear4bit):
    """A 4-bit layer that stays in training mode."""

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002  the mode is not taken over
        """Change nothing."""
        super().train(True)
        return self


class SteadyLinear8bit(bnb.nn.Linear8bitLt):
    """An int8 layer that stays in training mode."""

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002  the mode is not taken over
        """Change nothing."""
        super().train(True)
        return self
