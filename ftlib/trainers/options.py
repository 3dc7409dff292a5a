"""Options of a trainer that belong to its own objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftlib.errors import ConfigError
from ftlib.objectives import Objective

__all__ = ["refuse_without_effect"]


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
