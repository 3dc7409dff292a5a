"""The columns of the matrix: one record per trainer and kind of model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftlib.adapters import attach
from ftlib.data.collate import collate
from ftlib.engine import PPOConfig, TrainConfig
from ftlib.models import Masking, as_reward_model, forward
from ftlib.models.quantise import Quantisation
from ftlib.objectives import Cloze
from ftlib.trainers import ClassificationTrainer, DPOTrainer, PPOTrainer, RewardTrainer, SFTTrainer
from tests.matrix import bases
from tests.matrix.examples import CLASSES, CLOZES, MEMORY, PAIRS, PROMPTS
from tests.matrix.rows import Row
from tests.models.masked_zoo import MASK
from tests.models_zoo import EOS, VOCAB
from tests.trainers.preferences import moved

__all__ = ["COLUMNS", "Column"]


Learned = Callable[[Row, Any, list[dict[str, Any]]], None]


@dataclass(frozen=True)
class Column:
    """A trainer as the matrix tries it.

    Args:
        name: its heading.
        base: makes the model, quantised or not.
        trainer: makes the trainer of (model, examples, adapter=, config=).
        examples: all of which each step takes.
        read: what the model says of examples, as a tensor.
        steps: until the column's own asserts hold.
        learned: those, of (row, trainer, history).
        config: of settings.
        shell: what an adapter is put on, of a base.
        groups: documents share a flat row where the adapter lets them; else rows are padded.
        probe: examples to read, and for initialisations that look at data; None is `examples`.
    """

    name: str
    base: Callable[[Quantisation | None], PreTrainedModel]
    trainer: Callable[..., Any]
    examples: Sequence[Any]
    read: Callable[..., Tensor]
    steps: int
    learned: Learned
    config: Callable[..., TrainConfig] = TrainConfig
    shell: Callable[[Any], Any] = field(default=lambda base: base)
    groups: bool = True
    probe: Sequence[Any] | None = None

    @property
    def probed(self) -> Sequence[Any]:
        """Examples to read."""
        return self.examples if self.probe is None else self.probe

    def make(self, row: Row, *, model: Any = None, **options: Any) -> Any:
        """A trainer on all examples; of a fresh adapter, or of a model that has one, with these settings."""
        torch.manual_seed(0)  # of adapters and heads
        defaults: dict[str, Any] = {"progress": "off", "log_steps": 1, "schedule": "constant"}
        defaults |= {"batch_size": len(self.examples), "learning_rate": row.rate, "max_steps": 2}
        callbacks = options.pop("callbacks", ())
        made = self.trainer(
            self.base(row.held) if model is None else model,
            self.examples,
            adapter=row.make(self.probed) if model is None else None,
            config=self.config(**(defaults | options)),
            callbacks=callbacks,
        )
        if not self.groups:
            made.engine.scorer.path = "padded"
        return made

    def plain(self, row: Row, *, seed: int = 0) -> Any:
        """What an adapter is put on; `seed` draws its head."""
        torch.manual_seed(seed)
        return self.shell(self.base(row.held))

    def trained(self, row: Row, *, seed: int = 0) -> Any:
        """A model whose adapter has learnt something."""
        return moved(attach(self.plain(row, seed=seed), row.make(self.probed)))


def logprobs(model: nn.Module, examples: Sequence[Any], **options: Any) -> Tensor:
    """Of every trained token."""
    with torch.no_grad():
        return forward(model.eval(), collate(examples), **options).logprobs_N


def scores(model: nn.Module, examples: Sequence[Any], **options: Any) -> Tensor:
    """Of every continuation."""
    with torch.no_grad():
        found = forward(model.eval(), collate(examples), scores=True, **options).scores_CK
    assert found is not None
    return found


# -- what a trainer of each kind has to show -----------------------------------------------------------


def by_heart(row: Row, trainer: Any, history: list[dict[str, Any]]) -> None:
    """Eight rows of eight tokens."""
    assert history[-1]["loss"] <= row.left * history[0]["loss"]


def falls(row: Row, trainer: Any, history: list[dict[str, Any]]) -> None:
    """The loss, by a tenth of a nat at least: five virtual tokens say little to a random model."""
    assert min(row["loss"] for row in history) < history[0]["loss"] - 0.1


def right(row: Row, trainer: Any, history: list[dict[str, Any]]) -> None:
    """Every example is told."""
    assert trainer.evaluate(trainer.train_data)["eval_accuracy"] == 1.0


def prefers(row: Row, trainer: Any, history: list[dict[str, Any]]) -> None:
    """From the reference on."""
    assert abs(history[0]["loss"] - math.log(2)) < 1e-6
    assert history[-1]["margin"] > 0


def at_ratio_one(row: Row, trainer: Any, history: list[dict[str, Any]]) -> None:
    """The sampler, which pads on the left, and the first minibatch of each update agree with the forward."""
    assert max(row["first_ratio_deviation"] for row in history) < 1e-5
    assert max(row["sampler_gap"] for row in history) < 1e-5
    assert abs(history[0]["kl"]) < 1e-5 < abs(history[-1]["kl"])


def by_tokens(prompts: Any, completions: Any, *, completion_ids: list[list[int]]) -> list[float]:
    """A reward that tells completions apart."""
    return [sum(ids) / len(ids) / VOCAB for ids in completion_ids]


ppo = partial(PPOTrainer, reward=by_tokens)
with_critic = partial(ppo, critic="adapter")
ppo_config = partial(PPOConfig, epochs_per_rollout=1, max_new_tokens=4, critic_warmup=0, stop=[EOS])
PPO: dict[str, Any] = {"config": ppo_config, "probe": MEMORY}
hidden = Masking(MASK)
cloze = partial(SFTTrainer, objective=Cloze())
masked_cloze = partial(SFTTrainer, objective=Cloze(masking=hidden))
read_masked = partial(logprobs, masking=hidden)
COLUMNS = (
    Column("SFT", bases.decoder, SFTTrainer, MEMORY, logprobs, 60, by_heart, groups=False),
    Column("SFT grouped", bases.decoder, SFTTrainer, MEMORY, logprobs, 60, by_heart),
    Column("Reward", bases.decoder, RewardTrainer, PAIRS, scores, 25, right, shell=as_reward_model),
    Column("Classify by an encoder", bases.encoder, ClassificationTrainer, CLASSES, scores, 40, right),
    Column("DPO", bases.decoder, DPOTrainer, PAIRS, logprobs, 20, prefers),
    Column("PPO", bases.decoder, ppo, PROMPTS, logprobs, 2, at_ratio_one, **PPO),
    Column(
        "PPO with a critic on its base", bases.decoder, with_critic, PROMPTS, logprobs, 2, at_ratio_one, **PPO
    ),
    Column(
        "role on a shared base", bases.shared, RewardTrainer, PAIRS, scores, 25, right, shell=as_reward_model
    ),
    Column("SFT of T5", bases.t5, SFTTrainer, MEMORY, logprobs, 40, falls),
    Column("DPO of T5", bases.t5, DPOTrainer, PAIRS, logprobs, 20, prefers),
    Column("PPO of T5", bases.t5, ppo, PROMPTS, logprobs, 2, at_ratio_one, **PPO),
    Column("cloze by a decoder", bases.decoder, cloze, CLOZES, logprobs, 20, falls),
    Column("cloze by an encoder", bases.masked, masked_cloze, CLOZES, read_masked, 20, falls),
)
