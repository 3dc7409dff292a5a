"""Virtual tokens and an adapter of weights as one adapter, both trained.

    model(P, e(x_1), ..., e(x_T))   with   W x + s B A x   in the layers of the model

What it can do is what both can. How it lies in a model is said in `stacked.py`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any, cast

from peft import IA3Config, LoraConfig, PeftConfig
from peft.utils.peft_types import PeftType

from ftlib.adapters.adapter import Adapter
from ftlib.adapters.capability import intersection
from ftlib.adapters.tokens import move_new_tokens
from ftlib.checks import Wanted, check
from ftlib.errors import CapabilityError

__all__ = ["stack"]

PART = Wanted(
    "what ftlib.adapters makes, or a peft.PeftConfig", lambda value: isinstance(value, Adapter | PeftConfig)
)


def stack(a: Adapter | PeftConfig, b: Adapter | PeftConfig) -> Adapter:
    """Train virtual tokens and LoRA or IA3 together.

    The virtual tokens keep their default learning rate, all else takes that of the weights. New tokens and
    modules to save of either are those of both.

    Args:
        a: `prompt`, `p_tuning` or `prefix`; or `lora` or `ia3`.
        b: one of the other kind.

    Raises:
        ConfigError: what is no adapter.
        CapabilityError: two adapters that cannot be trained together.

    Example:
        >>> from ftlib.adapters import lora, prompt
        >>> stack(prompt(8), lora(4)).kind
        'prompt + lora'
    """
    check("stack", {"a": (a, PART), "b": (b, PART)})
    parts = [Adapter.of(each) if isinstance(each, PeftConfig) else each for each in (a, b)]
    virtual = [part for part in parts if _is_virtual(part)]
    weights = [part for part in parts if _is_of_weights(part)]
    if any(part.beneath is not None for part in parts) or len(virtual) != 1 or len(weights) != 1:
        raise CapabilityError(
            f"stack: expected virtual tokens, prompt(), p_tuning() or prefix(), with one adapter of weights, "
            f"lora() or ia3(), got {parts[0].kind} and {parts[1].kind}: {_why_not(parts)}. Take "
            "ftlib.adapters.stack(prompt(), lora())."
        )
    above, below = (deepcopy(cast(PeftConfig, part.config)) for part in (virtual[0], weights[0]))
    if getattr(below, "bias", "none") != "none":
        raise CapabilityError(
            f"stack: expected a LoRA with bias='none', got {cast(Any, below).bias!r}: these biases belong to "
            "the base, which is frozen under virtual tokens. Leave bias out."
        )
    move_new_tokens(below, above)
    _share_modules(below, above)
    return Adapter(
        f"{virtual[0].kind} + {weights[0].kind}",
        above,
        intersection(virtual[0].capabilities, weights[0].capabilities),
        virtual[0].start,
        beneath=replace(weights[0], config=below),
    )


def _is_virtual(part: Adapter) -> bool:
    return part.config is not None and part.config.is_prompt_learning


def _is_of_weights(part: Adapter) -> bool:
    config = part.config
    return isinstance(config, IA3Config) or (
        isinstance(config, LoraConfig) and config.peft_type == PeftType.LORA
    )


def _why_not(parts: list[Adapter]) -> str:
    if any(part.config is None for part in parts):
        return "full fine-tuning trains every weight already, and leaves none frozen under virtual tokens"
    if any(part.beneath is not None for part in parts):
        return "a stack has two levels"
    if all(map(_is_virtual, parts)):
        return "one of two sets of virtual tokens would not be read"
    if not any(map(_is_virtual, parts)):
        return "two adapters of weights are trained one after the other, the first one merged"
    return "the layers of other adapters are not known to train under virtual tokens"


def _share_modules(below: PeftConfig, above: PeftConfig) -> None:
    """Modules trained whole: each configuration names all of them, as each is saved with all of them."""
    named = [each for config in (below, above) for each in cast(Any, config).modules_to_save or ()]
    for config in (below, above):
        cast(Any, config).modules_to_save = list(dict.fromkeys(named)) or None
