"""Where PPO's values come from: a head on the policy's trunk, an adapter on the same base, or another model.

| critic | computes | memory beside the policy |
|---|---|---|
| "head" | in the policy's own forward | one vector |
| "adapter" | a second model around the same frozen base | an adapter and its optimiser |
| a model | itself | that model |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from torch import nn

from ftlib import adapters
from ftlib.adapters.attach import AnyModel
from ftlib.engine.engine import Engine
from ftlib.engine.optimizer_state import flatten_optimizer, restore_optimizer
from ftlib.engine.ppo_config import PPOConfig
from ftlib.errors import ConfigError
from ftlib.models.heads import new_value_head
from ftlib.models.parts import inner_model
from ftlib.models.sharing import on_same_base
from ftlib.objectives import PPO

__all__ = ["Critic", "CriticKind", "OwnCritic", "make_critic", "value_head_of"]

CriticKind = Literal["head", "adapter"]
RATE = 5.0  # of the critic's learning rate to the policy's


def value_head_of(model: nn.Module) -> nn.Linear:
    """A value head of zeros for the width of a model, on its device."""
    inner = inner_model(model)
    width = inner.config.get_text_config(decoder=True).hidden_size
    return new_value_head(width).to(inner.device)


def make_critic(
    kind: CriticKind | AnyModel,
    policy: AnyModel,
    objective: PPO,
    config: PPOConfig,
    *,
    steps: int,
    rate: float,
) -> OwnCritic | None:
    """A critic with a model and an optimiser of its own; None for "head".

    Args:
        kind: "head", "adapter", or a model to train whole or by the adapter it has.
        policy: whose base "adapter" shares.
        objective: the policy's.
        config: of the run.
        steps: optimiser steps planned.
        rate: peak learning rate of the policy.

    Raises:
        ConfigError: an unknown kind.
        CapabilityError: a base that cannot be shared.
    """
    if kind == "head":
        return None
    if kind == "adapter":
        model: AnyModel = adapters.attach(on_same_base(policy), adapters.lora())
    elif isinstance(kind, nn.Module):
        model = kind
    else:
        raise ConfigError(f"PPOTrainer: expected critic 'head', 'adapter' or a model, got {kind!r}.")
    rate = config.value_learning_rate or RATE * rate
    alone = replace(objective, policy=False, critic=True, trunk=True, entropy_coef=0.0, ptx_coef=0.0)
    engine = Engine(model, alone, config, steps, rate, value_head=value_head_of(model))
    return OwnCritic(engine)


@final
@dataclass(frozen=True, eq=False)
class OwnCritic:
    """A critic's engine, and its state for checkpoints."""

    engine: Engine

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments, schedule."""
        engine = self.engine
        moments, options = flatten_optimizer(engine.optimizer, engine.masters.named)
        weights = {f"weights/{name}": weight.detach() for name, weight in engine.masters.named.items()}
        return {
            **weights,
            **{f"moments/{name}": moment for name, moment in moments.items()},
            "options": options,
            "schedule": engine.schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take such a state over."""
        engine = self.engine
        parts: dict[str, dict[str, Any]] = {"weights": {}, "moments": {}}
        for name, value in state.items():
            kind, _, inner = name.partition("/")
            if kind in parts:
                parts[kind][inner] = value
        engine.masters.load(parts["weights"])
        restore_optimizer(engine.optimizer, engine.masters.named, parts["moments"], state["options"])
        engine.schedule.load_state_dict(state["schedule"])


Critic = OwnCritic | None
