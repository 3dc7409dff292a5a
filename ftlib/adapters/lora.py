"""Low-rank adaptation of linear layers, through peft.

    y = W x + s B A x,   A in R^{r x in}, B in R^{out x r}, s = alpha / r   (rslora: alpha / sqrt(r))

Source: Hu et al. 2021 (arXiv:2106.09685), eq. 3; rsLoRA: Kalajdzievski 2023 (arXiv:2312.03732);
DoRA: Liu et al. 2024 (arXiv:2402.09353), eq. 5; PiSSA: Meng et al. 2024 (arXiv:2404.02948);
OLoRA: Buyukakyuz 2024 (arXiv:2406.01775).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from peft import LoraConfig

from ftlib.adapters.adapter import Adapter
from ftlib.adapters.capability import capabilities_of
from ftlib.adapters.fused import fuse
from ftlib.errors import ConfigError

__all__ = ["LoraInit", "lora"]

LoraInit = Literal["default", "gaussian", "orthogonal", "pissa", "olora"]


def lora(
    r: int = 16,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] | None = None,
    init: LoraInit = "default",
    rslora: bool = False,
    dora: bool = False,
) -> Adapter:
    """Train two thin matrices per linear layer; the base stays frozen.

    Args:
        r: rank, >= 1.
        alpha: scale numerator; None means ``2 * r``.
        dropout: on the adapter's input, in [0, 1).
        targets: "all-linear" (all but the output head), module names, or one regular expression.
        modules_to_save: modules trained whole beside the adapter, e.g. ``["lm_head"]``.
        init: "default" (A Kaiming, B zero), "gaussian", "orthogonal", "pissa" or "olora". The last
            two start from the base's own factors and subtract them from it.
        rslora: scale by ``alpha / sqrt(r)``.
        dora: train the magnitude of each output row apart from its direction.

    Raises:
        ConfigError: a value out of range, or an initialisation that needs more than this call has.

    Example:
        >>> lora(r=8).config.lora_alpha
        16
    """
    if r < 1:
        raise ConfigError(f"lora: expected a rank r >= 1, got {r}.")
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"lora: expected dropout in [0, 1), got {dropout}.")
    if init not in get_args(LoraInit):
        raise ConfigError(
            f"lora: expected init to be one of {list(get_args(LoraInit))}, got {init!r}. Those made from "
            "data (eva, corda) take a peft.LoraConfig of your own, which every trainer accepts as `adapter`."
        )
    if init == "orthogonal" and r % 2:
        raise ConfigError(f"lora: expected an even rank for init='orthogonal', got {r}. Take r={r + 1}.")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,  # type: ignore[arg-type]  # peft takes floats too
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=None if modules_to_save is None else list(modules_to_save),
        init_lora_weights=True if init == "default" else init,
        use_rslora=rslora,
        use_dora=dora,
    )
    return Adapter("lora", fuse(config), capabilities_of(config))
