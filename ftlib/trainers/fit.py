"""Whether a model and its adapter fit the settings of a run, seen before any data are read."""

from __future__ import annotations

import logging

from ftlib.adapters import model_capabilities
from ftlib.adapters.attach import AnyModel
from ftlib.engine.config import TrainConfig
from ftlib.models.checkpointing import require_checkpointable

__all__ = ["planned_rate", "require_fit"]

logger = logging.getLogger(__name__)


def require_fit(model: AnyModel, config: TrainConfig) -> None:
    """Raise `CapabilityError` for a setting that the model's adapter cannot take."""
    if config.gradient_checkpointing:
        require_checkpointable(model)


def planned_rate(model: AnyModel, config: TrainConfig) -> float:
    """The peak learning rate: of the settings, or the adapter's default; a useless one is warned of."""
    capabilities, rate = model_capabilities(model), config.learning_rate
    if rate is None:
        return capabilities.learning_rate
    if 0 < rate < capabilities.slow_below:
        logger.warning(
            "learning_rate=%g hardly moves virtual tokens, which learn at 1e-3 to 1e-2. Leave it out for %g.",
            rate,
            capabilities.virtual_rate or capabilities.learning_rate,
        )
    return rate
