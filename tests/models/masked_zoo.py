"""A tiny random masked language model of each architecture that the tests need. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    DistilBertConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
)

from tests.data.tokenizers_zoo import tiny

__all__ = ["CLS", "MASK", "MASKED", "SEP", "VOCAB", "masking_tokenizer", "tiny_masked"]

VOCAB = 97
MASK, CLS, SEP = 3, 6, 4  # MASK is <|im_start|> of the tests' tokenizers
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 96,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_CONFIGS: dict[str, PretrainedConfig] = {
    "bert": BertConfig(**_COMMON, pad_token_id=0),
    "roberta": RobertaConfig(**_COMMON, pad_token_id=1),
    "distilbert": DistilBertConfig(
        vocab_size=VOCAB,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=96,
        dropout=0.0,
        attention_dropout=0.0,
    ),
}
MASKED = tuple(_CONFIGS)


def masking_tokenizer(kind: str = "byte_level", **options: Any) -> PreTrainedTokenizerBase:
    """A tiny tokenizer with a mask token."""
    tokenizer = tiny(kind, **options)
    tokenizer.mask_token = "<|im_start|>"
    return tokenizer


def tiny_masked(kind: str = "bert", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model in evaluation mode whose weights depend on `seed` alone, drawn wide so that errors show."""
    config = type(_CONFIGS[kind])(**{**_CONFIGS[kind].to_dict(), **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForMaskedLM.from_config(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" not in name.lower():
                    weight.normal_(0.0, 0.2)
    return model.eval()
