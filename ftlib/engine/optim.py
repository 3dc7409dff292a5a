"""Optimiser, schedule and float32 masters of the trained weights."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from ftlib.engine.config import TrainConfig
from ftlib.errors import ConfigError
from ftlib.models.sharding import distributed_like

__all__ = ["Masters", "make_optimizer", "make_schedule"]


@final
class Masters:
    """The trained weights in at least float32, and their gradients.

    A float32 weight is its own master. A bfloat16 one gets a float32 copy that the optimiser moves:
    an update smaller than 2 ** -9 of a weight would vanish in bfloat16.

    Args:
        parameters: name -> trainable parameter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.weights = dict(parameters)
        self.named: dict[str, nn.Parameter] = {
            name: weight if _is_wide(weight) else nn.Parameter(weight.detach().float())
            for name, weight in parameters.items()
        }
        self._narrow = [
            (self.weights[name], master)
            for name, master in self.named.items()
            if master is not self.weights[name]
        ]
        self._published = self._versions()

    @property
    def separate(self) -> bool:
        """Whether any weight has a master of its own."""
        return bool(self._narrow)

    @torch.no_grad()
    def collect(self) -> None:
        """Add the weights' gradients to the masters', in float32, and clear them."""
        for weight, master in self._narrow:
            if weight.grad is not None:
                wide = weight.grad.to(master.dtype)
                master.grad = wide if master.grad is None else master.grad.add_(wide)
                weight.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the weights the model computes with."""
        for weight, master in self._narrow:
            weight.copy_(master)
        self._published = self._versions()

    @torch.no_grad()
    def follow(self) -> None:
        """Take over what others wrote into the weights since `publish`: another trainer, for one."""
        for (weight, master), version in zip(self._narrow, self._published, strict=True):
            if weight._version != version and not torch.equal(weight, master.to(weight.dtype)):
                master.copy_(weight)
        self._published = self._versions()

    def _versions(self) -> list[int]:
        """How often each weight with a master of its own was written to."""
        return [weight._version for weight, _ in self._narrow]

    def copies(self) -> dict[str, Tensor]:
        """The masters' present values, by name; pieces where weights are."""
        return {name: master.detach().clone() for name, master in self.named.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set masters and weights from whole tensors by name."""
        for name, master in self.named.items():
            master.copy_(distributed_like(tensors[name], master))
        self.publish()


def _is_wide(weight: Tensor) -> bool:
    return weight.dtype in (torch.float32, torch.float64)


def make_optimizer(
    config: TrainConfig,
    parameters: Mapping[str, nn.Parameter],
    learning_rate: float,
    rates: Mapping[str, float] | None = None,
    undecayed: Container[str] = (),
) -> Optimizer:
    """The configured optimiser; weight decay on tensors of two axes or more only.

    Args:
        config: the run's settings.
        parameters: by name.
        learning_rate: peak.
        rates: peaks of the parameters that have one of their own.
        undecayed: names of more parameters without weight decay.

    Raises:
        ConfigError: the caller's function returns something else.
    """
    own = rates or {}
    members: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for decays in (True, False):  # matrices, then biases and norms
        for name, weight in parameters.items():
            if (weight.ndim >= 2 and name not in undecayed) is decays:
                settings = own.get(name, learning_rate), config.weight_decay if decays else 0.0
                members.setdefault((*settings, decays), []).append(weight)
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": decay} | ({"lr": rate} if rate != learning_rate else {})
        for (rate, decay, _), weights in members.items()
    ]
    if isinstance(config.optimizer, str):
        return AdamW(groups, lr=learning_rate, betas=config.betas, eps=config.eps, fused=True)
    made = config.optimizer(groups, learning_rate)
    if not isinstance(made, Optimizer):
        raise ConfigError(f"optimizer: expected a torch optimizer from your function, got {made!r:.80}.")
    return made


def make_schedule(config: TrainConfig, optimizer: Optimizer, steps: int) -> LRScheduler:
    """The configured schedule over `steps` optimiser steps.

    Raises:
        ConfigError: a name that needs settings of its own, or the caller's function returns something else.
    """
    if not isinstance(config.schedule, str):
        made = config.schedule(optimizer, steps)
        if not isinstance(made, LRScheduler):
            raise ConfigError(f"schedule: expected a torch LRScheduler from your function, got {made!r:.80}.")
        return made
    warmup = int(config.warmup) if config.warmup >= 1 else round(config.warmup * steps)
    name = "constant_with_warmup" if config.schedule == "constant" and warmup else config.schedule
    try:
        schedule: LRScheduler = get_scheduler(
            name, optimizer, num_warmup_steps=warmup, num_training_steps=steps
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"schedule: {name!r} needs settings of its own: {error} "
            "Give a function of (optimizer, steps) that makes it."
        ) from error
    return schedule
