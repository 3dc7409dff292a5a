"""IA3: learned vectors that scale keys, values and the inner activations of feed-forward blocks.

    k' = l_k * k,   v' = l_v * v,   h' = l_ff * h,   every l starts at 1

A layer trains 2 kv + f numbers: the widths of its keys and values and of its feed-forward block. Which
linear layers these are is read off the model (`structure.py`), whatever its architecture.

Source: Liu et al. 2022 (arXiv:2205.05638), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from peft import IA3Config, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import PreTrainedModel

from ftlib.adapters.adapter import Adapter
from ftlib.adapters.capability import capabilities_of
from ftlib.adapters.structure import find_projections, shortest_names
from ftlib.adapters.targets import targets_or
from ftlib.adapters.tokens import with_new_tokens
from ftlib.checks import check
from ftlib.errors import CapabilityError

__all__ = ["fit_ia3", "ia3"]


def ia3(*, targets: str | Sequence[str] = "auto", new_tokens: Sequence[int] | None = None) -> Adapter:
    """Train one vector per key, value and down-projection; the base stays frozen.

    Args:
        targets: "auto" finds keys, values and down-projections in the model, and in a matrix that holds
            queries too leaves those at 1. Or names of modules, or one regular expression; of these the
            down-projections are scaled at their input and the others at their output.
        new_tokens: ids of tokens whose rows of the embedding tables are trained too; see `lora`.

    Raises:
        ConfigError: no targets, or new tokens that are no ids.

    Example:
        >>> ia3().capabilities.identity_init
        True
    """
    check("ia3", {"targets": (targets, targets_or("auto"))})
    named = None if targets == "auto" else targets if isinstance(targets, str) else list(targets)
    # peft refuses names of one kind without the other, so both wait until the model is there
    config = IA3Config(task_type="CAUSAL_LM", target_modules=named, feedforward_modules=None)
    with_new_tokens(config, new_tokens, "ia3")
    return Adapter("ia3", config, capabilities_of(config))


def fit_ia3(config: IA3Config, model: PreTrainedModel | PeftModel) -> None:
    """Complete the targets of a configuration for this model; those that are named stay.

    Raises:
        CapabilityError: no keys and values, or no down-projections, can be told from the structure.
    """
    inner = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    found = find_projections(inner)
    if config.target_modules is None:
        if not (found.keys or found.fused) or not found.downs:
            missing = "down-projections" if found.keys or found.fused else "keys and values"
            raise CapabilityError(
                f"ia3: expected linear layers for keys, values and down-projections in "
                f"{type(inner).__name__}, found no {missing}. Name them: ia3(targets=[...])."
            )
        attention = shortest_names(inner, (*found.keys, *found.values, *found.fused))
        config.target_modules = sorted({*attention, *shortest_names(inner, found.downs)})
    if config.feedforward_modules is None:
        scaled = [name for name in found.downs if check_target_module_exists(config, name)]
        config.feedforward_modules = shortest_names(inner, scaled)
