"""What an adapter can do, as a record that trainers read instead of its name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, final

from peft import IA3Config, LoraConfig, PeftConfig
from peft.utils.peft_types import PeftType

from ftlib.errors import CapabilityError

__all__ = ["FULL", "LORA", "Capabilities", "capabilities_of"]


@final
@dataclass(frozen=True)
class Capabilities:
    """What a way of training can do. Compared with a trainer's plan before any data are read.

    Args:
        adds_positions: virtual tokens put before the text, as logit rows.
        needs_cache: works through a key/value cache, so it cannot run on a flat row.
        groupable: documents can share one flat row.
        mergeable: can be folded into the base weights.
        identity_init: a fresh one leaves the base's logits as they are.
        off_is_base: switched off, the base's logits come back bit for bit.
        checkpointable: works under activation checkpointing.
        pooling: how sequence classification finds the last token.
        learning_rate: default peak learning rate of a supervised trainer.
    """

    adds_positions: int = 0
    needs_cache: bool = False
    groupable: bool = True
    mergeable: bool = True
    identity_init: bool = True
    off_is_base: bool = True
    checkpointable: bool = True
    pooling: Literal["mask"] = "mask"
    learning_rate: float = 2e-4


FULL = Capabilities(mergeable=False, off_is_base=False, learning_rate=2e-5)
LORA = Capabilities()
_CHANGES_BASE = (
    "pissa",
    "olora",
    "corda",
    "loftq",
    "lora_ga",
)  # these initialisations subtract from the base


def capabilities_of(config: PeftConfig | None) -> Capabilities:
    """The record of any peft configuration; None is full fine-tuning.

    Raises:
        CapabilityError: prompt-learning configurations, whose virtual tokens need a path of their own.
    """
    if config is None:
        return FULL
    if config.is_prompt_learning:
        raise CapabilityError(
            f"adapter: expected a configuration that adapts weights, got {config.peft_type}, which adds "
            "virtual tokens. Use ftlib.adapters.lora() or full()."
        )
    if isinstance(config, LoraConfig) and config.peft_type == PeftType.LORA:
        init = config.init_lora_weights  # False asks for random factors, the second one too
        keeps_base = not str(init).startswith(_CHANGES_BASE) and config.bias == "none"
        return replace(LORA, identity_init=init is not False, off_is_base=keeps_base)
    if isinstance(config, IA3Config):
        return replace(LORA, identity_init=config.init_ia3_weights, learning_rate=3e-3)
    return replace(LORA, identity_init=False)  # another weight adapter: promise no more than peft itself does
