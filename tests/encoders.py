"""Tiny random encoders with a head for classification, and a tokenizer of each kind for them.

Hidden size 32, two layers, float32, dropout as told. Weights have a standard deviation of 0.2, so that a
wrong mask, position or segment changes the scores by far more than rounding does. Nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["CONTEXT", "ENCODERS", "TEXTS", "encoder", "encoder_tokenizer", "saved_encoder"]

CONTEXT = 40  # tokens
TEXTS = [
    "the cat sat on the mat and purred",
    "a dog barked",
    "rain fell on the roof all night long while nobody was at home",
    "sun",
    "the dog slept on the mat",
    "snow and rain",
    "a cat purred all night",
    "the roof was wet",
]
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": CONTEXT,
}
_SPECIFIC: dict[str, dict[str, Any]] = {
    "bert": _SIZES | {"pad_token_id": 0},
    "roberta": _SIZES | {"max_position_embeddings": CONTEXT + 2, "type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 64,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": 0,
    },
    "modernbert": _SIZES
    | {
        "pad_token_id": 0,
        "cls_token_id": 2,
        "sep_token_id": 3,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "local_attention": 8,
        "global_attn_every_n_layers": 2,
    },
    "electra": _SIZES | {"embedding_size": 32, "pad_token_id": 0},
}
ENCODERS = tuple(_SPECIFIC)
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "seq_classif_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "classifier_dropout",
)


def encoder_tokenizer(arch: str = "bert") -> PreTrainedTokenizerFast:
    """Words as tokens, with the special tokens and the template for pairs of BERT or of RoBERTa."""
    roberta = arch == "roberta"
    pad, cls, sep = ("<pad>", "<s>", "</s>") if roberta else ("[PAD]", "[CLS]", "[SEP]")
    special = [cls, pad, sep, "<unk>"] if roberta else [pad, "[UNK]", cls, sep, "[MASK]"]
    unknown = "<unk>" if roberta else "[UNK]"
    backend = Tokenizer(models.WordLevel(unk_token=unknown))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=special))
    ids = {token: backend.token_to_id(token) for token in (cls, sep)}
    between = f"{sep} {sep} $B {sep}" if roberta else f"{sep} $B:1 {sep}:1"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=f"{cls} $A {between}", special_tokens=list(ids.items())
    )
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if arch in ("bert", "electra") else [])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unknown,
        pad_token=pad,
        cls_token=cls,
        sep_token=sep,
        model_input_names=names,
    )


def encoder(
    arch: str = "bert",
    *,
    labels: int = 3,
    seed: int = 0,
    dropout: float = 0.0,
    auto: Any = AutoModelForSequenceClassification,
    **changes: Any,
) -> PreTrainedModel:
    """A model with random weights that depend on `seed` alone, in evaluation mode."""
    specific = _SPECIFIC[arch] | {"vocab_size": len(encoder_tokenizer(arch)), "num_labels": labels} | changes
    config = CONFIG_MAPPING[arch](**specific)
    for name in _DROPOUTS:
        if getattr(config, name, None) is not None:
            setattr(config, name, dropout)
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = auto.from_config(config, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saved_encoder(
    folder: Path, arch: str = "bert", *, auto: Any = AutoModelForMaskedLM, **options: Any
) -> Path:
    """A folder with a pretrained encoder: of masked language modelling, which has no classification head."""
    encoder(arch, auto=auto, **options).save_pretrained(folder)
    encoder_tokenizer(arch).save_pretrained(folder)
    return folder
