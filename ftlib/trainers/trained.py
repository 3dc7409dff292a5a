"""What can be asked of a trainer's model, before, during and after training.

A subclass says how records are encoded (`default_encoder`), what an evaluation reports (`evaluation`),
what is predicted of each example (`predictions`), and whether the model writes text (`no_generation`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from ftlib.adapters.attach import AnyModel
from ftlib.batches import LossOutput
from ftlib.checks import PATH, SWITCH, check
from ftlib.data.encode import Encoder
from ftlib.engine.config import TrainConfig
from ftlib.engine.determinism import forked_rng, modes
from ftlib.engine.engine import Engine
from ftlib.errors import CapabilityError, ConfigError
from ftlib.evaluation import decode, generate
from ftlib.export import save
from ftlib.models.parts import language_task
from ftlib.models.sharding import gathered
from ftlib.trainers.card import card_data
from ftlib.trainers.inputs import check_ids, context_length, encode
from ftlib.trainers.snapshot import Boundary

__all__ = ["TrainedModel"]

logger = logging.getLogger(__name__)
Examples = Sequence[Mapping[str, Any]]


class TrainedModel:
    """The half of `Trainer` that does not train. None of its methods changes the model."""

    config: TrainConfig
    model: AnyModel
    tokenizer: PreTrainedTokenizerBase | None
    engine: Engine
    boundary: Boundary
    train_data: Any
    eval_data: Any
    _encoder: Encoder | None
    _encoded_elsewhere: bool = False  # the training data came encoded, and nobody said by what

    # -- what a subclass says ------------------------------------------------------------------

    no_generation: ClassVar[str | None] = None  # why `generate` is refused: a model that writes no text

    def default_encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """How records become examples."""
        return Encoder(tokenizer, task=language_task(self.model))

    def evaluation(self, output: LossOutput) -> dict[str, float]:
        """What an evaluation reports: the loss, its terms where there are several, and the metrics.

        Args:
            output: sums and counts over all examples and ranks.
        """
        terms = {name: float(mean.value) for name, mean in output.terms.items()}
        parts = {f"loss_{name}": value for name, value in terms.items()} if len(terms) > 1 else {}
        metrics = {name: float(mean.value) for name, mean in output.metrics.items()}
        return {"loss": sum(terms.values()), **parts, **metrics}

    def predictions(self, data: Examples) -> list[dict[str, Any]]:
        """One prediction per example, in order; every rank has all of them. No gradient, no dropout."""
        rows = []
        for index in range(len(data)):
            terms = self.engine.evaluate([data[index]]).terms.values()
            loss = sum(float(mean.value) for mean in terms)
            rows.append({"loss": loss, "weight": sum(float(mean.count) for mean in terms)})
        return rows

    # -- what a user asks ----------------------------------------------------------------------

    @property
    def encoder(self) -> Encoder:
        """How this trainer encodes records and prompts.

        Raises:
            ConfigError: there is no tokenizer.
        """
        if self._encoder is None:
            self._encoder = self.default_encoder(self._needed_tokenizer())
            if self._encoded_elsewhere:
                logger.warning(
                    "the training data came encoded, perhaps with other options than those of the default "
                    "encoder, which encodes records and prompts from here on. Give the trainer the one "
                    "that was used: encoder=."
                )
        return self._encoder

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """Loss and metrics on `dataset`, or on the trainer's `eval_dataset`. Changes nothing.

        Returns:
            ``{"eval_loss", ...}``; trainers of token likelihoods add ``"eval_perplexity"``.
        """
        data = self._evaluated(dataset)
        with forked_rng(), modes(self.model):
            output = self.engine.evaluate([data[index] for index in range(len(data))])
        return {f"eval_{name}": value for name, value in self.evaluation(output).items()}

    def predict(self, dataset: Any) -> list[dict[str, Any]]:
        """What the model says of each example, in order: by default its loss and trained weight."""
        data = self._encoded(dataset, "predict")
        with forked_rng(), modes(self.model), torch.no_grad():
            self.model.eval()
            return self.predictions(data)

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        **generation_options: Any,
    ) -> list[str]:
        """Completions of `prompts`, which go through the formatter the trainer trains with.

        Args:
            prompts: strings, message lists, or rows with a "prompt".
            max_new_tokens: per completion.
            do_sample: greedy when False.
            generation_options: of transformers' `GenerationConfig`, such as temperature.

        Raises:
            CapabilityError: what is trained writes no text, or is sharded.
            ConfigError: one string, of which each letter would be a prompt; or an unknown option.
        """
        if self.no_generation is not None:
            raise CapabilityError(f"generate: {self.no_generation}")
        if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
            raise ConfigError(
                f"generate: expected a list of prompts, got {prompts!r:.60}. Put it into a list."
            )
        if self.engine.sharded:
            raise CapabilityError(
                "generate: expected a model that lies whole on this rank, got one sharded by FSDP. Save it, "
                "trainer.save(folder), and load it in one process: ftlib.load(folder)."
            )
        tokenizer = self._needed_tokenizer()
        encoded = [self.encoder.encode_prompt(prompt) for prompt in prompts]
        stops = self.encoder.stop_ids
        ids = generate(
            self.model,
            tokenizer,
            encoded,
            stop_ids=stops,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            **generation_options,
        )
        return decode(tokenizer, ids, stop_ids=stops)

    def save(self, folder: str | Path, *, samples: bool = True) -> Path:
        """The trained thing: adapter or model, tokenizer, model card.

        Loads in plain peft and transformers, with no ftlib installed. Of a sharded model every rank takes
        part, and the first one writes.

        Args:
            folder: where to.
            samples: show up to three training examples, cut short, in the model card.
        """
        check("save", {"folder": (folder, PATH), "samples": (samples, SWITCH)})
        card = card_data(
            type(self).__name__.removesuffix("Trainer"),
            self.config,
            self.engine.learning_rate,
            self.train_data,
            self.tokenizer,
            self.boundary.history,
            samples=samples,
        )
        writes = self.engine.accelerator.is_main_process or not self.engine.sharded
        with gathered(self.model, keep=writes):
            if writes:
                save(folder, self.model, self.tokenizer, card=card, stop_ids=self._stop_ids())
            if self.engine.sharded:
                self.engine.agreed(False)  # the others wait until it is there
        return Path(folder).expanduser()

    def _stop_ids(self) -> tuple[int, ...]:
        """What ends a completion of this model; nothing of one that writes none, or was encoded elsewhere."""
        if self._encoder is None or self._encoded_elsewhere or self.no_generation is not None:
            return ()
        return self._encoder.stop_ids

    def _evaluated(self, dataset: Any) -> Examples:
        """What an evaluation is of: `dataset`, or the trainer's own for None."""
        data: Examples | None = self.eval_data if dataset is None else self._encoded(dataset, "evaluate")
        if data is None:
            raise ConfigError(
                "evaluate: expected data, got none. Give a dataset here or eval_dataset to the trainer."
            )
        return data

    def _encoded(self, data: Any, name: str) -> Any:
        apart = language_task(self.model) == "seq2seq_lm"
        encoded = encode(data, lambda: self.encoder, context_length(self.model), name=name, apart=apart)
        check_ids(encoded, self.model, name)
        return encoded

    def _needed_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ConfigError("trainer: records and prompts need a tokenizer. Give tokenizer=.")
        return self.tokenizer
