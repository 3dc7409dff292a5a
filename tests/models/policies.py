"""Tiny policies in every state that a reference has to cope with.

Each is a Llama in training mode, without dropout unless it says so, whose weights depend on `seed` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import IA3Config, LoraConfig
from torch import Tensor, nn

from ftlib.adapters import attach, lora
from ftlib.models.forward import forward
from tests.models_zoo import tiny_model
from tests.packed import random_batch

__all__ = ["BATCH", "BESIDE", "NAME", "POLICIES", "gradients", "policy", "policy_logprobs", "train"]

BATCH = random_batch()
NAME = "mine"  # of the adapter: any name works
BESIDE = "other"  # of a second adapter
STEP = 0.05


def _adapted(**options: object) -> Callable[[], nn.Module]:
    return lambda: attach(tiny_model().requires_grad_(False), lora(4, **options), name=NAME)  # type: ignore[arg-type]


def _ia3() -> nn.Module:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    return attach(tiny_model().requires_grad_(False), config, name=NAME)


def _with_tokens() -> nn.Module:
    """Two rows of the embedding are trained too, through a layer of their own."""
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], trainable_token_indices=[5, 60]
    )
    return attach(tiny_model().requires_grad_(False), config, name=NAME)


def _with_norms() -> nn.Module:
    """Weights of the base are trained beside the adapter."""
    model = _adapted()()
    for name, weight in model.named_parameters():
        weight.requires_grad_(weight.requires_grad or "norm" in name)
    return model


def _beside_pissa() -> nn.Module:
    """An inactive adapter has changed the base, and peft was asked for one more."""
    model: Any = attach(tiny_model().requires_grad_(False), lora(4, init="pissa"), name=BESIDE)
    model.add_adapter(NAME, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    model.set_adapter(NAME)
    return model  # type: ignore[no-any-return]


def _trained(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = make()
        train(model)
        return model

    return made


POLICIES: dict[str, Callable[[], nn.Module]] = {
    "lora": _adapted(),
    "lora gaussian": _adapted(init="gaussian"),
    "lora orthogonal": _adapted(init="orthogonal"),
    "lora dropout": _adapted(dropout=0.3),
    "lora and head": _adapted(modules_to_save=["lm_head"]),
    "lora on embeddings": _adapted(targets=["embed_tokens", "q_proj"]),
    "lora and tokens": _with_tokens,
    "lora trained": _trained(_adapted()),
    "rslora": _adapted(rslora=True),
    "dora": _adapted(dora=True),
    "dora trained": _trained(_adapted(dora=True)),
    "pissa": _adapted(init="pissa"),
    "pissa trained": _trained(_adapted(init="pissa")),
    "ia3": _ia3,
    "lora and norms": _with_norms,
    "lora beside pissa": _beside_pissa,
    "full": tiny_model,
    "full trained": _trained(tiny_model),
}


def policy(state: str, *, seed: int = 0) -> nn.Module:
    """One of `POLICIES`."""
    torch.manual_seed(seed)
    return POLICIES[state]().train()


@torch.no_grad()
def train(model: nn.Module, *, seed: int = 1) -> None:
    """Move every trainable weight, as an optimiser would."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(STEP * torch.randn(weight.shape, generator=generator))


def policy_logprobs(model: nn.Module) -> Tensor:
    """What the policy says in a training step, but for dropout: with the graph of a backward."""
    modes = {module: module.training for module in model.modules()}
    for module in model.modules():
        module.training = module.training and not isinstance(module, nn.Dropout)
    logprobs_N = forward(model, BATCH).logprobs_N
    for module, mode in modes.items():
        module.training = mode
    return logprobs_N


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of the trained weights, by name."""
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
