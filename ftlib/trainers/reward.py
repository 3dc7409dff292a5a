"""Reward modelling. The loss is `objectives.Reward`, the formula `losses.bradley_terry`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast, final

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ftlib.adapters.attach import AnyModel
from ftlib.adapters.normalisation import Normalisation, normalisation_of, set_normalisation
from ftlib.batches import PackedBatch
from ftlib.data.collate import collate
from ftlib.data.encode import Encoder
from ftlib.data.sampler import pack
from ftlib.engine.config import TrainConfig
from ftlib.errors import DataError
from ftlib.evaluation.pairs import ScoredAnswers, as_answers, pair_metrics
from ftlib.models import forward
from ftlib.models.heads import as_reward_model
from ftlib.objectives import Objective, Reward
from ftlib.trainers.base import Trainer
from ftlib.trainers.inputs import AnyAdapter
from ftlib.trainers.options import refuse_without_effect
from ftlib.trainers.result import TrainResult
from ftlib.trainers.scores import seen_scores
from ftlib.trainers.trained import Examples

__all__ = ["RewardTrainer"]


@final
class RewardTrainer(Trainer):
    """Trains a score to be higher for the better of two answers.

    Takes preference records (``chosen`` and ``rejected``, or ranked ``answers``). A language model is made
    into a reward model that shares its body: a score head of one output, always trained and always saved,
    whatever the adapter. What is saved loads in plain transformers as
    `AutoModelForSequenceClassification`, with equal scores.

    Args:
        model: see `Trainer`; a language model, or a reward model to train further.
        train_dataset: see `Trainer`.
        eval_dataset: see `Trainer`.
        tokenizer: see `Trainer`.
        adapter: see `Trainer`.
        config: see `Trainer`.
        callbacks: see `Trainer`.
        objective: see `Trainer`.
        encoder: see `Trainer`.
        center: weight of ``(chosen + rejected) ** 2``, which keeps scores around zero; >= 0.

    Example:
        >>> trainer = RewardTrainer(model, pairs, tokenizer=tokenizer)  # doctest: +SKIP
        >>> trainer.train(), trainer.evaluate()["eval_accuracy"]  # doctest: +SKIP
    """

    task: ClassVar[str] = "reward"
    compares: ClassVar[bool] = True
    no_generation: ClassVar[str | None] = (
        "expected a trainer whose model writes text, got a reward model, which scores it. Use score()."
    )

    def __init__(
        self,
        model: AnyModel | str | Path,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapter: AnyAdapter | None = None,
        config: TrainConfig | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        objective: Objective | None = None,
        encoder: Encoder | None = None,
        center: float = 0.0,
    ) -> None:
        refuse_without_effect(objective, {"center": (center, 0.0)})
        self._center = center
        super().__init__(
            model,
            train_dataset,
            eval_dataset,
            tokenizer=tokenizer,
            adapter=adapter,
            config=config,
            callbacks=callbacks,
            objective=objective,
            encoder=encoder,
        )

    def prepare_model(self, model: AnyModel, tokenizer: PreTrainedTokenizerBase | None) -> AnyModel:
        """A language model as a reward model."""
        return as_reward_model(model, tokenizer)

    def default_objective(self) -> Objective:
        """`objectives.Reward`."""
        return Reward(center=self._center)

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """Loss, and `evaluation.pair_metrics`: accuracy, margin, calibration, rewards, length bias.

        With data of several files, the metrics of each are under its name too.
        """
        data = self._evaluated(dataset)
        with seen_scores(self.engine, data) as seen:
            metrics = super().evaluate(seen.rows)
        scored = zip(seen.rows, seen.by_row(), strict=True)
        more = pair_metrics([as_answers(row, [score for (score,) in scores]) for row, scores in scored])
        return metrics | {f"eval_{name}": value for name, value in more.items()}

    def answers(self, dataset: Any = None) -> list[ScoredAnswers]:
        """Scores, lengths and ranks of the answers of each example; what `plots.roc` draws.

        Args:
            dataset: as for `evaluate`.
        """
        data = self._evaluated(dataset)
        scored = self.predict(data)
        return [as_answers(data[index], row["scores"]) for index, row in enumerate(scored)]

    def predictions(self, data: Examples) -> list[dict[str, Any]]:
        """The head's score of each answer, in the order of the example."""
        rows: list[dict[str, Any]] = [{} for _ in data]
        for members in pack([int(row["length"]) for row in data], self.engine.max_tokens):
            batch = collate([data[index] for index in members]).to(self.engine.device)
            scores_CK = cast(Tensor, forward(self.engine.scorer, batch, scores=True).scores_CK)
            flat = iter(scores_CK[:, 0].tolist())
            for index in members:
                rows[index] = {"scores": [next(flat) for _ in data[index]["continuation_ids"]]}
        return rows

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """The reward of each completion of its prompt, normalised where `fit_normalisation` was called.

        Args:
            prompts: strings or message lists, as in the data.
            completions: likewise, one per prompt.

        Raises:
            DataError: rows that the encoder refuses or drops.
        """
        scores = self._scores(prompts, completions)
        scale = normalisation_of(self.model)
        return scores if scale is None else [scale(score) for score in scores]

    def fit_normalisation(self, prompts: Sequence[Any], completions: Sequence[Any]) -> None:
        """From now on these completions have a `score` of mean 0 and (population) deviation 1.

        Saved with the weights, and forgotten when training goes on. It never enters a loss, an evaluation
        or a prediction.

        Args:
            prompts: see `score`.
            completions: of reference, e.g. those of the data that supervised training learned.

        Raises:
            DataError: completions that all score the same.
        """
        scores = np.asarray(self._scores(prompts, completions))
        if np.ptp(scores) == 0:
            raise DataError(
                f"fit_normalisation: expected completions whose scores differ, got {len(scores)} that all "
                f"score {scores[0]:.4g}. Give more of them, or train the model first."
            )
        set_normalisation(self.model, Normalisation(float(scores.mean()), float(scores.std())))

    def train(
        self, resume: bool | str | Path | None = None, *, allow_changes: Sequence[str] = ()
    ) -> TrainResult:
        """See `Trainer.train`."""
        set_normalisation(self.model, None)
        return super().train(resume, allow_changes=allow_changes)

    def step(self, batch: PackedBatch | Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """See `Trainer.step`."""
        set_normalisation(self.model, None)
        return super().step(batch)

    def _scores(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """As the head gives them."""
        if isinstance(prompts, str) or isinstance(completions, str):
            raise DataError(
                "score: expected lists of prompts and completions, got a string. Put it into a list."
            )
        if len(prompts) != len(completions) or not prompts:
            raise DataError(
                f"score: expected completions, one per prompt, got {len(prompts)} prompts and "
                f"{len(completions)} completions."
            )
        both = zip(prompts, completions, strict=True)
        encoded = self.encoder([{"prompt": prompt, "completion": text} for prompt, text in both])
        if len(encoded) != len(prompts):
            raise DataError(
                f"score: expected one example per completion ({len(prompts)}), got {len(encoded)} from the "
                "trainer's encoder. Give shorter ones, of one assistant turn each."
            )
        return [row["scores"][0] for row in self.predict(encoded)]
