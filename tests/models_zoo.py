"""Tiny random causal language models, one per architecture the library promises to train.

Each has a vocabulary of 97, hidden size 32, two layers, float32 weights, no dropout, and grouped-query
attention where the architecture has it. Weights are drawn with a standard deviation of 0.2, ten times
the usual one, so that a wrong mask or position changes the logits by far more than rounding does.
Nothing is downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["ARCHITECTURES", "BOS", "EOS", "PAD", "VOCAB", "WINDOW", "tiny_config", "tiny_model"]

VOCAB = 97
BOS, EOS, PAD = 1, 2, 0
WINDOW = 8  # tokens; shorter than the tests' documents, so that it is seen to act
CONTEXT = 128
WEIGHT_STD = 0.2

_COMMON: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_DECODER: dict[str, Any] = _COMMON | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": CONTEXT,
    "attention_dropout": 0.0,
}
_GROUPED: dict[str, Any] = _DECODER | {"num_key_value_heads": 2, "head_dim": 8}

# Gemma's soft caps are lowered from 50 and 30 to where these small logits feel them.
_SPECIFIC: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "qwen2": {key: value for key, value in _GROUPED.items() if key != "head_dim"},
    "qwen3": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": WINDOW},
    "gemma2": _GROUPED
    | {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": _GROUPED
    | {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "gpt2": _COMMON
    | {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 64,
        "n_positions": CONTEXT,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "opt": _COMMON
    | {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": CONTEXT,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "layerdrop": 0.0,
    },
    "gpt_neox": _DECODER | {"hidden_dropout": 0.0},
    "phi": _DECODER | {"num_key_value_heads": 2, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}

ARCHITECTURES: tuple[str, ...] = tuple(_SPECIFIC)


def tiny_config(arch: str, **changes: Any) -> PretrainedConfig:
    """The configuration of one architecture of `ARCHITECTURES`, with `changes` on top."""
    config: PretrainedConfig = CONFIG_MAPPING[arch](**(_SPECIFIC[arch] | changes))
    return config


def tiny_model(
    arch: str = "llama",
    *,
    seed: int = 0,
    attention: str = "eager",
    auto: Any = AutoModelForCausalLM,
    **changes: Any,
) -> PreTrainedModel:
    """A model with random weights that depend on `seed` alone, in evaluation mode.

    Args:
        arch: one of `ARCHITECTURES`.
        seed: of the private generator; the global random state is left alone.
        attention: transformers' `attn_implementation`.
        auto: transformers' auto class, of another task than language modelling, say.
        changes: configuration fields to replace.
    """
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = auto.from_config(
            tiny_config(arch, **changes), attn_implementation=attention, dtype=torch.float32
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # tied weights are listed once
            is_norm = ("norm" in name or ".ln_" in name) and name.endswith("weight")
            centre = 1.0 if is_norm and "gemma" not in arch else 0.0  # Gemma stores its norms as w - 1
            parameter.copy_(centre + WEIGHT_STD * torch.randn(parameter.shape, generator=generator))
    return model.eval()
