"""Supervised fine-tuning. The loss is `objectives.SFT`, the formula `losses.nll`.

Domain pre-training is the same trainer on `text` records: an empty prefix, every token trained.
"""

from __future__ import annotations

import logging
from typing import final

from ftlib.batches import LossOutput
from ftlib.evaluation import perplexity
from ftlib.objectives import SFT, Objective
from ftlib.trainers.base import Trainer
from ftlib.trainers.inputs import count_comparisons

__all__ = ["SFTTrainer"]

logger = logging.getLogger(__name__)


@final
class SFTTrainer(Trainer):
    """Minimises the weighted negative log-likelihood of the trained tokens. Arguments: see `Trainer`.

    Example:
        >>> trainer = SFTTrainer(model, records, tokenizer=tokenizer)  # doctest: +SKIP
        >>> trainer.train().metrics["loss"]  # doctest: +SKIP
    """

    def default_objective(self) -> Objective:
        """`objectives.SFT`, which trains the best of several answers alone."""
        compared = count_comparisons(self.train_data)
        if compared:
            logger.warning(
                "%d of %d examples compare answers: the best of each is trained, the others are not used. "
                "DPOTrainer learns from both sides.",
                compared,
                len(self.train_data),
            )
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
