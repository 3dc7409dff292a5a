"""Supervised fine-tuning. The loss is `objectives.SFT`, the formula `losses.nll`.

Domain pre-training is the same trainer on `text` records: an empty prefix, every token trained.
"""

from __future__ import annotations

from typing import final

from ftlib.objectives import SFT, Objective
from ftlib.trainers.base import Trainer

__all__ = ["SFTTrainer"]


@final
class SFTTrainer(Trainer):
    __doc__ = (Trainer.__doc__ or "").replace(
        "Supervised training on one device or several ranks. Use a subclass.",
        "Minimises the weighted negative log-likelihood of the trained tokens.",
    )

    def default_objective(self) -> Objective:
        """`objectives.SFT`."""
        return SFT()
