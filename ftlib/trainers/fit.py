"""Whether a model and its adapter fit the settings of a run, seen before any data are read."""

from __future__ import annotations

import logging

from ftlib.adapters import model_capabilities
from ftlib.adapters.attach import AnyModel
from ftlib.adapters.capability import Capabilities
from ftlib.engine.config import TrainConfig
from ftlib.models.checkpointing import require_checkpointable

__all__ = ["default_rate", "planned_rate", "require_fit"]

logger = logging.getLogger(__name__)


def require_fit(model: AnyModel, config: TrainConfig) -> None:
    """Raise `CapabilityError` for a setting that the model's adapter cannot take."""
    if config.gradient_checkpointing:
        require_checkpointable(model)


def default_rate(capabilities: Capabilities, share: float) -> float:
    """The peak learning rate of a trainer that takes `share` of the supervised one.

    Virtual tokens keep theirs under any loss: they hardly move at rates that suit weights. In a stack the
    rate is that of the weights, and theirs their own.

    Example:
        >>> from ftlib.adapters.capability import LORA
        >>> default_rate(LORA, 1 / 5)
        4e-05
    """
    alone = capabilities.virtual_tokens and capabilities.virtual_rate is None
    rate = capabilities.learning_rate * (1.0 if alone else share)
    return round(rate, 12)  # 4e-06, not 4.000000000000001e-06


def planned_rate(model: AnyModel, config: TrainConfig, share: float) -> float:
    """The peak learning rate: of the settings, or the default; a useless one is warned of."""
    capabilities, rate = model_capabilities(model), config.learning_rate
    default = default_rate(capabilities, share)
    if rate is None:
        return default
    if 0 < rate < capabilities.slow_below:
        logger.warning(
            "learning_rate=%g hardly moves virtual tokens, which learn at 1e-3 to 1e-2. Leave it out for %g.",
            rate,
            capabilities.virtual_rate or default,
        )
    return rate
