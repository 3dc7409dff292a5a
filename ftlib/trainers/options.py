"""Options of a trainer that belong to its own objective, and settings that belong to its own kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from ftlib.checks import Wanted, check
from ftlib.engine.config import TrainConfig
from ftlib.engine.ppo_config import PPOConfig
from ftlib.errors import ConfigError
from ftlib.objectives import Objective

__all__ = ["checked_objective", "checked_settings", "refuse_without_effect"]

OBJECTIVE = Wanted(
    "an objective, with counts(batch) and a call of (model, batch)",
    lambda value: isinstance(value, Objective),
)
Settings = TypeVar("Settings", bound=TrainConfig)


def checked_settings(config: Settings | None, kind: type[Settings], trainer: str) -> Settings:
    """The settings of a run; for None the defaults of their kind.

    Args:
        config: the caller's, or None.
        kind: that the trainer reads.
        trainer: its name, for the message.

    Raises:
        ConfigError: settings of another kind, of which some would be ignored or missing.
    """
    made = kind() if config is None else config
    if not isinstance(made, kind) or isinstance(made, PPOConfig) is not (kind is PPOConfig):
        raise ConfigError(
            f"{trainer}: expected config as a {kind.__name__}, got {type(made).__name__}. Give "
            f"config=ftlib.{kind.__name__}(...)."
        )
    return made


def checked_objective(objective: Objective | None) -> Objective | None:
    """The caller's objective, or None.

    Raises:
        ConfigError: something else.
    """
    check("trainer", {"objective": (objective, OBJECTIVE.or_none)})
    return objective


def refuse_without_effect(objective: Objective | None, options: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse options of the trainer's own objective beside one that the caller gives.

    Args:
        objective: the caller's, or None.
        options: name -> (value, default).

    Raises:
        ConfigError: an option that differs from its default would be ignored.
    """
    given = [name for name, (value, default) in options.items() if value is not default and value != default]
    if objective is not None and given:
        raise ConfigError(
            f"trainer: {', '.join(given)} has no effect beside an objective of your own. "
            "Give it to the objective."
        )
