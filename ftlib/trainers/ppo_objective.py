"""The objective of a PPO run and its settings: which of them it takes over, and whether they fit together."""

from __future__ import annotations

from dataclasses import fields

from ftlib.engine.ppo_config import PPOConfig
from ftlib.errors import ConfigError
from ftlib.objectives import PPO, Objective
from ftlib.trainers.options import refuse_without_effect

__all__ = ["SHARED", "check_objective"]

_DEFAULTS = {field.name: field.default for field in fields(PPOConfig)}
SHARED = tuple(field.name for field in fields(PPO) if field.name in _DEFAULTS)
"""Names of settings that are the objective's."""


def check_objective(objective: Objective | None, config: PPOConfig) -> None:
    """Refuse an objective of the caller's that does not fit the settings of the run.

    Raises:
        ConfigError: it is no `objectives.PPO`, sees another temperature than is sampled at, or leaves a
            setting without effect.
    """
    if objective is None:
        return
    if not isinstance(objective, PPO):
        raise ConfigError(
            f"PPOTrainer: expected objective as ftlib.objectives.PPO(...), got {type(objective).__name__}."
        )
    if objective.temperature != config.temperature:
        raise ConfigError(
            f"PPOTrainer: expected the objective's temperature to be that of sampling, got "
            f"{objective.temperature} and PPOConfig(temperature={config.temperature}). Set both."
        )
    own = [name for name in SHARED if name != "temperature"]
    refuse_without_effect(objective, {name: (getattr(config, name), _DEFAULTS[name]) for name in own})
