"""Where PPO's values come from: a head on the policy's trunk, an adapter on the same base, or another model.

| critic | computes | memory beside the policy |
|---|---|---|
| "head" | in the policy's own forward | one vector |
| "adapter" | a second model around the same frozen base | an adapter and its optimiser |
| a model | itself | that model and its optimiser |

A model may be a reward model: its body is the critic's, under a new head, since a score is no value yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, final

from torch import Tensor, nn

from ftlib import adapters
from ftlib.adapters.attach import AnyModel, model_capabilities
from ftlib.adapters.capability import LORA
from ftlib.engine.engine import Engine
from ftlib.engine.optimizer_state import flatten_optimizer, restore_optimizer
from ftlib.engine.ppo_config import PPOConfig
from ftlib.errors import ConfigError
from ftlib.models.heads import new_value_head
from ftlib.models.parts import inner_model
from ftlib.models.sharing import on_same_base, shared_with
from ftlib.objectives import PPO
from ftlib.trainers.fit import default_rate

__all__ = ["RATE_SHARE", "CriticKind", "OwnCritic", "make_critic", "value_head_of", "value_rate"]

CriticKind = Literal["head", "adapter"]
RATE = 5.0  # of the critic's learning rate to the policy's
# of the policy's default rate to a supervised one: 4e-5 for LoRA, as in tinker-cookbook's rl_loop, and 4e-6
# for all weights, near the 3e-6 of Huang et al. 2024 (arXiv 2403.17031)
RATE_SHARE = 1 / 5


def value_head_of(model: nn.Module) -> nn.Linear:
    """A value head of zeros for the width of a model, on its device."""
    inner = inner_model(model)
    width = inner.config.get_text_config(decoder=True).hidden_size
    return new_value_head(width).to(inner.device)


def value_rate(config: PPOConfig, rate: float, policy: AnyModel) -> float:
    """Peak learning rate of a critic, from that of the policy.

    Virtual tokens learn at rates that would throw a head about, so theirs is not the measure.
    """
    if config.value_learning_rate is not None:
        return config.value_learning_rate
    return RATE * (default_rate(LORA, RATE_SHARE) if model_capabilities(policy).virtual_tokens else rate)


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
        ConfigError: an unknown kind, or a model that trains weights of the policy.
        CapabilityError: a base that cannot be shared, or a model that is no decoder.
    """
    if isinstance(kind, nn.Module):
        _require_own(kind, policy)
        model = kind
    elif kind == "adapter":
        model = adapters.attach(on_same_base(policy), adapters.lora())
    elif kind == "head":
        return None
    else:
        raise ConfigError(f"PPOTrainer: expected critic 'head', 'adapter' or a model, got {kind!r}.")
    alone = replace(objective, policy=False, critic=True, trunk=True, entropy_coef=0.0, ptx_coef=0.0)
    engine = Engine(
        model, alone, config, steps, value_rate(config, rate, policy), value_head=value_head_of(model)
    )
    return OwnCritic(engine)


def _require_own(critic: nn.Module, policy: nn.Module) -> None:
    shared = shared_with(critic, policy)
    if shared:
        raise ConfigError(
            f"PPOTrainer: expected a critic with weights of its own, got one that trains {len(shared)} of "
            f"the policy's, {shared[0]} among them. Take critic='adapter', or a copy of the model."
        )


@final
@dataclass(frozen=True, eq=False)
class OwnCritic:
    """A critic's engine, and its state for checkpoints."""

    engine: Engine

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments, schedule."""
        engine = self.engine
        moments, options = flatten_optimizer(engine.optimizer, engine.masters.named)
        return {
            **{f"weights/{name}": weight.detach() for name, weight in engine.masters.named.items()},
            **{f"moments/{name}": moment for name, moment in moments.items()},
            "options": options,
            "schedule": engine.schedule.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take such a state over."""
        engine = self.engine
        self.load_weights(state)
        restore_optimizer(engine.optimizer, engine.masters.named, _under("moments", state), state["options"])
        engine.schedule.load_state_dict(state["schedule"])

    def weights(self) -> dict[str, Tensor]:
        """Copies of what is trained, by the names of `state_dict`."""
        return {f"weights/{name}": weight for name, weight in self.engine.masters.copies().items()}

    def load_weights(self, state: Mapping[str, Any], /) -> None:
        """Take the weights of such a state over, and nothing else."""
        self.engine.masters.load(_under("weights", state))


def _under(kind: str, state: Mapping[str, Any]) -> dict[str, Any]:
    prefix = f"{kind}/"
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
