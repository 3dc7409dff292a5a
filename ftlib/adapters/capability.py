"""What an adapter can do, as a record that trainers read instead of its name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast, final

from peft import IA3Config, LoraConfig, PeftConfig, PromptLearningConfig
from peft.utils.peft_types import PeftType

from ftlib.adapters.initial import changes_base
from ftlib.errors import CapabilityError, ConfigError

__all__ = ["FULL", "LORA", "Capabilities", "capabilities_of", "intersection"]


@final
@dataclass(frozen=True)
class Capabilities:
    """What a way of training can do. Compared with a trainer's plan before any data are read.

    Args:
        adds_positions: virtual tokens put before the text, as logit rows.
        virtual_tokens: how much of the model's context it takes, in tokens, as rows or as keys and values.
        needs_cache: works through a key/value cache, so it cannot run on a flat row.
        groupable: documents can share one flat row.
        mergeable: can be folded into the base weights.
        identity_init: a fresh one leaves the base's logits as they are.
        off_is_base: switched off, the base's logits come back bit for bit.
        checkpointable: works under activation checkpointing.
        pooling: how sequence classification finds the last token.
        learning_rate: default peak learning rate of a supervised trainer; others take a share of it.
        virtual_rate: that of virtual tokens beside weights, whose default is `learning_rate`; else None.
        slow_below: a peak below this hardly moves it.
    """

    adds_positions: int = 0
    virtual_tokens: int = 0
    needs_cache: bool = False
    groupable: bool = True
    mergeable: bool = True
    identity_init: bool = True
    off_is_base: bool = True
    checkpointable: bool = True
    pooling: Literal["mask"] = "mask"
    learning_rate: float = 2e-4
    virtual_rate: float | None = None
    slow_below: float = 0.0


FULL = Capabilities(mergeable=False, off_is_base=False, learning_rate=2e-5)
LORA = Capabilities()


def capabilities_of(config: PeftConfig | None) -> Capabilities:
    """The record of any peft configuration; None is full fine-tuning.

    Raises:
        CapabilityError: a kind of virtual tokens that no path here takes.
    """
    if config is None:
        return FULL
    if config.is_prompt_learning:
        return _of_virtual_tokens(config)
    if isinstance(config, LoraConfig) and config.peft_type == PeftType.LORA:
        init = config.init_lora_weights  # False asks for random factors, the second one too
        keeps_base = not changes_base(config) and config.bias == "none"
        return replace(LORA, identity_init=init is not False, off_is_base=keeps_base)
    if isinstance(config, IA3Config):
        return replace(LORA, identity_init=config.init_ia3_weights, learning_rate=3e-3)
    return replace(LORA, identity_init=False)  # another weight adapter: promise no more than peft itself does


def intersection(virtual: Capabilities, weights: Capabilities) -> Capabilities:
    """What virtual tokens and an adapter of weights can do together: what both can."""
    return Capabilities(
        adds_positions=virtual.adds_positions,
        virtual_tokens=virtual.virtual_tokens,
        needs_cache=virtual.needs_cache or weights.needs_cache,
        groupable=virtual.groupable and weights.groupable,
        mergeable=virtual.mergeable and weights.mergeable,
        identity_init=virtual.identity_init and weights.identity_init,
        off_is_base=virtual.off_is_base and weights.off_is_base,
        checkpointable=virtual.checkpointable and weights.checkpointable,
        learning_rate=weights.learning_rate,
        virtual_rate=virtual.learning_rate,
        slow_below=virtual.slow_below,
    )


_ROWS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)  # virtual tokens as embeddings
_CACHED = (PeftType.PREFIX_TUNING,)  # as keys and values


def _of_virtual_tokens(config: PeftConfig) -> Capabilities:
    """Nothing that starts from random or sampled tokens is the base, nor is a prefix of zeros."""
    kind = PeftType(config.peft_type)
    count: int | None = cast(PromptLearningConfig, config).num_virtual_tokens
    if kind not in (*_ROWS, *_CACHED):
        raise CapabilityError(
            f"adapter: expected virtual tokens of ftlib.adapters.prompt(), p_tuning() or prefix(), got "
            f"{kind.value}. Take one of these, or ftlib.adapters.lora()."
        )
    if count is None or count < 1:
        raise ConfigError(f"adapter: expected num_virtual_tokens >= 1 for {kind.value}, got {count!r}.")
    cached = kind in _CACHED
    encoded = kind == PeftType.P_TUNING or getattr(config, "prefix_projection", False)
    return Capabilities(
        adds_positions=0 if cached else count,
        virtual_tokens=count,
        needs_cache=cached,
        groupable=not cached,
        mergeable=False,
        identity_init=False,
        checkpointable=not cached,
        learning_rate=1e-3 if encoded else 5e-3,
        slow_below=1e-4,
    )
