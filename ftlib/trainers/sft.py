"""Supervised fine-tuning. The loss is `objectives.SFT`, the formula `losses.nll`.

Domain pre-training is the same trainer on `text` records: an empty prefix, every token trained.
"""

from __future__ import annotations

from typing import final

from ftlib.batches import LossOutput
from ftlib.evaluation import perplexity
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

    def evaluation(self, output: LossOutput) -> dict[str, float]:
        """With the perplexity, ``exp(nll)``, unless an objective of the caller's own has no such term."""
        reported = super().evaluation(output)
        if "nll" not in output.terms:
            return reported
        return {
            "loss": reported["loss"],
            "perplexity": perplexity(float(output.terms["nll"].value)),
            **reported,
        }
