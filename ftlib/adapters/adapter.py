"""An adapter as a frozen declaration: a peft configuration and what it can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from peft import PeftConfig
from peft.utils.peft_types import PeftType

from ftlib.adapters.capability import Capabilities, capabilities_of

__all__ = ["Adapter"]


@final
@dataclass(frozen=True)
class Adapter:
    """What to train on top of a base model. `attach` binds it; the declaration itself never changes.

    Args:
        kind: the factory's name, for logs and model cards.
        config: peft's configuration, copied before use; None trains every weight.
        capabilities: what it can do; trainers read these.
    """

    kind: str
    config: PeftConfig | None
    capabilities: Capabilities

    @classmethod
    def of(cls, config: PeftConfig) -> Adapter:
        """Any peft configuration as an adapter."""
        return cls(PeftType(config.peft_type).value.lower(), config, capabilities_of(config))
