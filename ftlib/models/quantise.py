"""How `ftlib.load` quantises a base as it reads it, through bitsandbytes.

nf4: blocks of 64 in 4-bit NormalFloat, their scales quantised once more. int8: one scale per output row,
and no outlier threshold, with which a row's result would depend on the rest of its batch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, PretrainedConfig

from ftlib.errors import ConfigError, MissingPackageError

__all__ = ["Quantisation", "classifier_linears", "parse_quantisation", "quantised_loading"]

Quantisation = Literal["int8", "nf4"]


def parse_quantisation(quantize: str | None, *, gguf_file: str | None) -> Quantisation | None:
    """What was asked for, if it can be done here.

    Raises:
        ConfigError: an unknown kind, or beside a GGUF file.
        MissingPackageError: bitsandbytes is not installed.
    """
    if quantize is None:
        return None
    if quantize not in get_args(Quantisation):
        raise ConfigError(
            f"load: expected quantize None or one of {list(get_args(Quantisation))}, got {quantize!r}."
        )
    if gguf_file is not None:
        raise ConfigError(
            f"load: quantize={quantize!r} needs plain weights, got the GGUF file {gguf_file}. Save it as "
            "such once: model, tokenizer = ftlib.load(file); model.save_pretrained(folder); "
            "tokenizer.save_pretrained(folder)."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            f"load: quantize={quantize!r} needs the package bitsandbytes: pip install 'ftlib[quant]'."
        )
    return cast(Quantisation, quantize)


def quantised_loading(
    kind: Quantisation | None,
    dtype: torch.dtype,
    place: torch.device | None,
    heads: Sequence[str] = (),
) -> dict[str, Any]:
    """What transformers is told, so that it quantises while it reads; nothing for None.

    Args:
        kind: "int8" or "nf4".
        dtype: of the computation, and of what is not quantised.
        place: where the model will compute; None is the accelerator if there is one, else the CPU.
        heads: names of modules that stay as they are; none leaves the choice to transformers, which spares
            the output embedding of a language model.
    """
    if kind is None:
        return {}
    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if heads:
        config.llm_int8_skip_modules = list(heads)
    there = {} if place is None else {"device_map": {"": place}}
    return {"quantization_config": config, **there}


def classifier_linears(config: PretrainedConfig) -> list[str]:
    """Names of the linear layers that are part of a classifier's head: beside the body, or its pooler."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    body = {id(module) for module in model.base_model.modules()}
    pooler = dict(model.base_model.named_children()).get("pooler", nn.Identity())
    spared = {id(module) for module in model.modules()} - body | {id(module) for module in pooler.modules()}
    return [
        name
        for name, module in model.named_modules()
        if id(module) in spared and isinstance(module, nn.Linear)
    ]
