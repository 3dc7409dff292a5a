"""Tiny models whose linear layers bitsandbytes holds, the same at every call."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ftlib.adapters.quantised import steady
from ftlib.models.quantise import Quantisation, quantised_loading
from ftlib.models.quiet import quiet
from tests.models_zoo import tiny_model

__all__ = ["KINDS", "WIDE", "quantised_model"]

KINDS: tuple[Quantisation, ...] = ("nf4", "int8")
WIDE: dict[str, dict[str, Any]] = {  # whole blocks of 64 weights in every row
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
    "gpt2": {"n_embd": 64, "n_inner": 128},
}


def quantised_model(
    kind: Quantisation, arch: str = "llama", *, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A quantised copy of ``tiny_model(arch, **WIDE[arch])``, frozen, as `ftlib.load` makes it."""
    with tempfile.TemporaryDirectory() as folder, quiet():
        tiny_model(arch, **WIDE[arch]).save_pretrained(folder)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", **quantised_loading(kind, dtype, None)
        )
    steady(model)
    model.name_or_path = model.config.name_or_path = ""  # the folder is gone
    return model.requires_grad_(False)
