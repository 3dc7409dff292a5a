"""A tiny PPO trainer on prompts of uneven lengths, the same at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ftlib.adapters import attach, lora
from ftlib.engine import PPOConfig
from ftlib.trainers import PPOTrainer
from tests.models.policies import train as move
from tests.models_zoo import EOS, VOCAB, tiny_model

__all__ = ["PROMPTS", "Captured", "by_tokens", "ppo", "prompts", "sgd", "weights"]

OWN = ("reward", "critic", "reference", "sampler", "objective", "ptx_dataset", "callbacks", "eval_prompts")


def prompts(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Encoded prompts of 1 to 7 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "prefix_ids": torch.randint(3, VOCAB, (1 + 3 * index % 7,), generator=generator).tolist(),
            "source": f"prompts:{index}",
        }
        for index in range(count)
    ]


PROMPTS = prompts(4)


def by_tokens(prompts: Any, completions: Any, *, completion_ids: list[list[int]]) -> list[float]:
    """A reward that tells completions apart: the mean of their ids, less for length."""
    return [sum(ids) / len(ids) / VOCAB - len(ids) / 20 for ids in completion_ids]


def ppo(
    *,
    model: nn.Module | str = "llama",
    adapter: Any = "lora",
    data: Any = None,
    trained: bool = False,
    **options: Any,
) -> PPOTrainer:
    """A trainer of four rows per update, in one minibatch and two epochs.

    Args:
        model: an architecture, or a model.
        adapter: "lora" of rank 4, an adapter, or None for all weights.
        data: prompts, in place of `PROMPTS`.
        trained: the adapter has learnt something before, so the reference is a snapshot of it.
        options: of `PPOConfig`; and those of the trainer.
    """
    torch.manual_seed(0)  # of the adapter's initialisation
    own = {name: options.pop(name) for name in OWN if name in options}
    made: Any = tiny_model(model) if isinstance(model, str) else model
    if adapter is not None:
        made = attach(made.requires_grad_(False), lora(4) if adapter == "lora" else adapter)
    if trained:
        move(made)
    defaults = {
        "progress": "off",
        "learning_rate": 1e-3,
        "batch_size": 4,
        "epochs_per_rollout": 2,
        "max_new_tokens": 5,
        "critic_warmup": 0,
        "log_steps": 1,
        "stop": [EOS],
    }
    return PPOTrainer(
        made,
        PROMPTS if data is None else data,
        **({"reward": by_tokens} | own),
        config=PPOConfig(**(defaults | options)),
    )


def weights(trainer: PPOTrainer) -> dict[str, Tensor]:
    """Copies of what the policy's optimiser moves, by name."""
    return trainer.engine.masters.copies()


def sgd(groups: Any, rate: float) -> torch.optim.Optimizer:
    """Steps that are linear in the gradient, so that rounding stays rounding."""
    return torch.optim.SGD(groups, 0.05, 0.9)


class Captured(TrainerCallback):
    """The gradients of every optimiser step, after they were clipped."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.trainer: PPOTrainer | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        named = self.trainer.engine.masters.named
        self.steps.append(
            {name: weight.grad.clone() for name, weight in named.items() if weight.grad is not None}
        )
