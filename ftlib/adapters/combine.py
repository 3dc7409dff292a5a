"""Several LoRAs on one base as a single one.

    sum_i w_i s_i B_i A_i  =  [B_1 .. B_n] [w_1 s_1 A_1; ..; w_n s_n A_n]

Stacking the factors ("cat") is exact and has the sum of their ranks. What keeps the rank is an
approximation, and named so: its error, relative to the sum, is commonly a third and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast, get_args

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraModel

from ftlib.errors import CapabilityError, ConfigError

__all__ = ["Combination", "combine"]

Combination = Literal["cat", "approximate_svd", "approximate_linear"]
_PEFTS: dict[str, Literal["cat", "svd", "linear"]] = {
    "cat": "cat",
    "approximate_svd": "svd",
    "approximate_linear": "linear",
}


def combine(
    model: PeftModel,
    adapters: Sequence[str],
    how: Combination = "cat",
    *,
    weights: Sequence[float] | None = None,
    name: str = "combined",
) -> PeftModel:
    """Add the weighted sum of LoRAs as one more adapter, which becomes the active one.

    Args:
        model: with the adapters, changed in place.
        adapters: their names, at least one.
        how: "cat" is exact, of the sum of their ranks. "approximate_svd" keeps the largest of their ranks
            and what it holds best; "approximate_linear" adds factor to factor, of one rank for all.
        weights: one per adapter; None weighs each by 1.
        name: of the sum.

    Returns:
        The model.

    Raises:
        ConfigError: names that are unknown, taken or none, other numbers of weights, or ranks that differ
            where one is needed.
        CapabilityError: adapters that are not plain LoRA, whose changes do not add up.

    Example:
        >>> combine(model, ["a", "b"], weights=[0.5, 0.5])  # doctest: +SKIP
    """
    if how not in get_args(Combination):
        raise ConfigError(f"combine: expected how to be one of {list(get_args(Combination))}, got {how!r}.")
    unknown = [each for each in adapters if each not in model.peft_config]
    if unknown or not adapters or name in model.peft_config:
        raise ConfigError(
            f"combine: expected names out of {sorted(model.peft_config)} and a free one for their sum, got "
            f"{list(adapters)} and {name!r}."
        )
    factors = [1.0] * len(adapters) if weights is None else list(weights)
    if len(factors) != len(adapters):
        raise ConfigError(f"combine: expected {len(adapters)} weights, got {len(factors)}.")
    configs = [model.peft_config[each] for each in adapters]
    odd = [
        each
        for each, config in zip(adapters, configs, strict=True)
        if not isinstance(config, LoraConfig) or config.use_dora or config.modules_to_save
    ]
    if odd:
        raise CapabilityError(
            f"combine: expected plain LoRAs, whose changes add up, got {odd}: DoRA divides by a norm, and "
            "modules trained whole replace each other. Fold one in instead: ftlib.adapters.merge(model)."
        )
    plain = cast(list[LoraConfig], configs)
    if how == "approximate_linear" and len({config.r for config in plain}) > 1:
        raise ConfigError(
            f"combine: expected one rank for how='approximate_linear', got {[config.r for config in plain]}. "
            "Take how='cat'."
        )
    first, scaled_by_root = plain[0], plain[0].use_rslora
    try:
        first.use_rslora = False  # peft copies this one, with a scale of 1 in mind
        cast(LoraModel, model.base_model).add_weighted_adapter(
            list(adapters), factors, name, combination_type=_PEFTS[how]
        )
    finally:
        first.use_rslora = scaled_by_root
    model.set_adapter(name)
    return model
