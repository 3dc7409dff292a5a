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
    """Minimises the weighted negative log-likelihood of the trained tokens. Arguments: see `Trainer`.

    Example:
        >>> trainer = SFTTrainer(model, records, tokenizer=tokenizer)  # doctest: +SKIP
        >>> trainer.train().metrics["loss"]  # doctest: +SKIP
    """

    def default_objective(self) -> Objective:
        """`objectives.SFT`."""
        return SFT()
