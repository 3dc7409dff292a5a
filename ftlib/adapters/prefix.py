"""Prefix tuning: trained keys and values before those of the text, in every layer, through peft.

    attention_l(q, [K_l; k], [V_l; v]),   K_l, V_l in R^{n x kv}
    projection:  [K_1, V_1, ..., K_L, V_L] = W_2 tanh(W_1 E),   E in R^{n x kv}

With the projection E, W_1 and W_2 are trained; saved for others are the keys and values.

Source: Li and Liang 2021 (arXiv:2101.00190), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from peft import PrefixTuningConfig
from transformers import PreTrainedTokenizerBase

from ftlib.adapters.adapter import Adapter
from ftlib.adapters.capability import capabilities_of
from ftlib.adapters.soft import SoftStart
from ftlib.adapters.tokens import with_new_tokens
from ftlib.checks import COUNT, SWITCH, TEXT, check, one_of
from ftlib.errors import ConfigError

__all__ = ["PrefixInit", "prefix"]

PrefixInit = Literal["random", "text", "vocab"]


def prefix(
    tokens: int = 20,
    *,
    projection: bool = False,
    hidden: int | None = None,
    init: PrefixInit = "random",
    text: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: Sequence[int] | None = None,
) -> Adapter:
    """Train the keys and values of `tokens` positions before the text, in every layer.

    Args:
        tokens: n, >= 1. They count towards the model's context.
        projection: compute them by a two-layer network, whose weights are trained instead.
        hidden: that network's width, >= 1; None takes the width of a layer's keys.
        init: what they start from. "text" and "vocab": keys and values that the model itself has for
            a text, or for frequent tokens; at first the model then says what it says after these tokens.
            "random", N(0, 1), learns slowly.
        text: of "text"; repeated or cut to `tokens`, without special tokens.
        tokenizer: splits the text; None takes the trainer's, or the one beside the model.
        new_tokens: ids of tokens whose rows of the embedding tables are trained too; see `lora`.

    Raises:
        ConfigError: a value out of range, or one without effect.

    Example:
        >>> prefix(8).capabilities.needs_cache
        True
    """
    check(
        "prefix",
        {
            "tokens": (tokens, COUNT),
            "projection": (projection, SWITCH),
            "hidden": (hidden, COUNT.or_none),
            "init": (init, one_of(PrefixInit)),
            "text": (text, TEXT.or_none),
        },
    )
    if hidden is not None and not projection:
        raise ConfigError("prefix: hidden has no effect without projection=True. Give both.")
    if projection and init != "random":
        raise ConfigError(
            f"prefix: expected init='random' with projection=True, got {init!r}: a network cannot be made to "
            "give the keys and values of a text. Leave projection out."
        )
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=tokens,
        prefix_projection=projection,
        encoder_hidden_size=hidden,  # type: ignore[arg-type]  # None: peft takes the width of the keys
    )
    with_new_tokens(config, new_tokens, "prefix")
    return Adapter("prefix", config, capabilities_of(config), SoftStart(init, text, (), tokenizer))
