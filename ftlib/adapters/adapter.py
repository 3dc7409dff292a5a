"""An adapter as a frozen declaration: a peft configuration and what it can do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

from peft import PeftConfig
from peft.utils.peft_types import PeftType

from ftlib.adapters.capability import Capabilities, capabilities_of
from ftlib.adapters.soft import SoftStart

__all__ = ["Adapter"]


@final
@dataclass(frozen=True)
class Adapter:
    """What to train on top of a base model. `attach` binds it; the declaration itself never changes.

    Args:
        kind: the factory's name, for logs and model cards.
        config: peft's configuration, copied before use; None trains every weight.
        capabilities: what it can do; trainers read these.
        start: what virtual tokens start from; None leaves that to peft.
        data: what an initialisation is computed from; None for none.
        beneath: an adapter of weights that is trained with these virtual tokens; None for none.
    """

    kind: str
    config: PeftConfig | None
    capabilities: Capabilities
    start: SoftStart | None = None
    data: Any = field(default=None, repr=False)
    beneath: Adapter | None = None

    @classmethod
    def of(cls, config: PeftConfig) -> Adapter:
        """Any peft configuration as an adapter."""
        return cls(PeftType(config.peft_type).value.lower(), config, capabilities_of(config))
