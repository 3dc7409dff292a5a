"""Low-rank adaptation of linear layers, through peft.

    y = W x + s B A x,   A in R^{r x in}, B in R^{out x r}, s = alpha / r   (rslora: alpha / sqrt(r))

Source: Hu et al. 2021 (arXiv:2106.09685), eq. 3; rsLoRA: Kalajdzievski 2023 (arXiv:2312.03732);
DoRA: Liu et al. 2024 (arXiv:2402.09353), eq. 5; PiSSA: Meng et al. 2024 (arXiv:2404.02948);
OLoRA: Buyukakyuz 2024 (arXiv:2406.01775); EVA: Paischer et al. 2024 (arXiv:2410.07170).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from peft import EvaConfig, LoraConfig

from ftlib.adapters.adapter import Adapter
from ftlib.adapters.capability import capabilities_of
from ftlib.adapters.eva import RHO
from ftlib.adapters.fused import fuse
from ftlib.adapters.targets import MODULES, targets_or
from ftlib.adapters.tokens import with_new_tokens
from ftlib.checks import COUNT, SWITCH, TEXT, check, number
from ftlib.errors import ConfigError

__all__ = ["LoraInit", "lora"]

LoraInit = Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva"]
_RANDOMISED = re.compile(r"pissa_niter_[1-9]\d*")


def lora(
    r: int = 16,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] | None = None,
    init: LoraInit | str = "default",
    data: Any = None,
    new_tokens: Sequence[int] | None = None,
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
        init: "default" (A Kaiming, B zero), "gaussian", "orthogonal", "eva", "pissa", "pissa_niter_4" (a
            randomised decomposition in 4 rounds, or any other number of them) or "olora". The PiSSAs and
            OLoRA start from the base's own factors and subtract them from it.
        data: for init="eva": encoded examples, on which the inputs of the layers are seen.
        new_tokens: ids of tokens whose rows of the embedding tables are trained too, of both where there
            are two. The model must have the rows: ``model.resize_token_embeddings(len(tokenizer))``.
        rslora: scale by ``alpha / sqrt(r)``.
        dora: train the magnitude of each output row apart from its direction.

    Raises:
        ConfigError: a value out of range, or an initialisation that needs more than this call has.

    Example:
        >>> lora(r=8).config.lora_alpha
        16
    """
    check(
        "lora",
        {
            "r": (r, COUNT),
            "alpha": (alpha, number(above=0).or_none),
            "dropout": (dropout, number(0, below=1)),
            "targets": (targets, targets_or("all-linear")),
            "modules_to_save": (modules_to_save, MODULES.or_none),
            "init": (init, TEXT),
            "rslora": (rslora, SWITCH),
            "dora": (dora, SWITCH),
        },
    )
    if init not in get_args(LoraInit) and not _RANDOMISED.fullmatch(init):
        raise ConfigError(
            f"lora: expected init to be one of {[*get_args(LoraInit), 'pissa_niter_<rounds>']}, got "
            f"{init!r}. Others take a peft.LoraConfig of your own, which every trainer accepts as `adapter`."
        )
    if init == "orthogonal" and r % 2:
        raise ConfigError(f"lora: expected an even rank for init='orthogonal', got {r}. Take r={r + 1}.")
    if (init == "eva") is not (data is not None):
        raise ConfigError(
            f"lora: expected data exactly for init='eva', got init={init!r} "
            f"{'without' if data is None else 'with'} data. Give encoded examples: "
            "lora(init='eva', data=ftlib.Encoder(tokenizer)(records))."
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,  # type: ignore[arg-type]  # peft takes floats too
        lora_dropout=dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=None if modules_to_save is None else list(modules_to_save),
        init_lora_weights=True if init == "default" else init,  # type: ignore[arg-type]  # and its rounds
        use_rslora=rslora,
        use_dora=dora,
        eva_config=EvaConfig(rho=RHO) if init == "eva" else None,
    )
    with_new_tokens(config, new_tokens, "lora")
    return Adapter("lora", fuse(config), capabilities_of(config), data=data)
