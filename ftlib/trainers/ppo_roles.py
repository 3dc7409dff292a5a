"""Who takes part in a PPO run beside the policy, from what the caller gave.

| role | made in |
|---|---|
| critic | `ftlib.trainers.ppo_critic` |
| reference | `ftlib.models.references` |
| reward | `ftlib.trainers.ppo_inputs` |
| sampler | `ftlib.rollouts` |

All are made of the weights that the policy has when the trainer is made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast, final

from torch import nn

from ftlib.adapters.attach import AnyModel
from ftlib.engine.engine import Engine
from ftlib.engine.launch import refuse_sharding
from ftlib.engine.ppo_config import PPOConfig
from ftlib.errors import ConfigError
from ftlib.losses import AdaptiveKL, FixedKL
from ftlib.models.parts import require_decoder
from ftlib.models.references import Kind, Reference
from ftlib.objectives import PPO, Objective
from ftlib.rollouts import Sampler
from ftlib.trainers.ppo_critic import CriticKind, make_critic, value_head_of, value_rate
from ftlib.trainers.ppo_inputs import AnyReward
from ftlib.trainers.ppo_steps import Learners

__all__ = ["Given", "check_roles", "make_learners", "penalty_of"]

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, eq=False)
class Given:
    """What the caller said of the roles; see `PPOTrainer`."""

    reward: AnyReward
    reference: Kind | nn.Module | Reference | None
    critic: CriticKind | AnyModel
    sampler: Sampler | None


def check_roles(given: Given, policy: nn.Module, config: PPOConfig, rollouts: int) -> None:
    """Refuse what cannot be trained, and warn of what would not be.

    Args:
        given: the roles.
        policy: the model.
        config: of the run.
        rollouts: planned.

    Raises:
        CapabilityError: weights in pieces, or an encoder-decoder.
        ConfigError: a penalty without a reference.
    """
    refuse_sharding("PPOTrainer", "its sampler and its roles run the policy outside of the prepared forward")
    require_decoder(policy, "PPOTrainer")
    if given.reference is None and config.kl_coef:
        raise ConfigError(f"PPOTrainer: kl_coef={config.kl_coef} needs a reference. Give one, or kl_coef=0.")
    if config.critic_warmup >= rollouts:
        logger.warning(
            "critic_warmup=%d covers all %d rollouts: the policy is not trained. Raise max_steps.",
            config.critic_warmup,
            rollouts,
        )


def make_learners(
    given: Given,
    policy: AnyModel,
    objective: Objective,
    config: PPOConfig,
    *,
    rollouts: int,
    rate: float,
    before_update: Callable[[], object],
    after_update: Callable[[], object],
) -> Learners:
    """What makes the optimiser steps of policy and critic.

    Args:
        given: the roles.
        policy: the model.
        objective: an `objectives.PPO`; its values are left to a critic with a model of its own.
        config: of the run.
        rollouts: planned.
        rate: peak learning rate of the policy.
        before_update: see `Engine`.
        after_update: see `Engine`.

    Raises:
        ConfigError: see `make_critic`.
        CapabilityError: likewise.
    """
    own = given.critic != "head"
    whole = cast(PPO, objective)
    of_policy = replace(whole, critic=False) if own else whole
    per_rollout = config.epochs_per_rollout * config.minibatches
    critic = make_critic(given.critic, policy, of_policy, config, steps=rollouts * per_rollout, rate=rate)
    # rollouts in which the policy's own schedule stands still
    alone = min(config.critic_warmup, rollouts - 1) if own else 0
    engine = Engine(
        policy,
        of_policy,
        config,
        (rollouts - alone) * per_rollout,
        rate,
        value_head=value_head_of(policy) if of_policy.critic else None,
        value_learning_rate=value_rate(config, rate, policy),
        before_update=before_update,
        after_update=after_update,
    )
    return Learners(engine, critic, of_policy)


def penalty_of(config: PPOConfig) -> FixedKL | AdaptiveKL:
    """What decides the strength of the KL penalty."""
    if config.kl_target is None:
        return FixedKL(config.kl_coef)
    return AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
