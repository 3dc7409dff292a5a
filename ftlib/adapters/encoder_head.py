"""The head of a classifier over an encoder: all that belongs to its task instead of to its body.

    head = every module with weights beside the body, and the body's pooler

A head may be several modules: DistilBERT has a layer before its last one, ModernBERT a layer with a norm,
and BERT a pooler that many checkpoints lack. peft trains and saves `classifier` and `score` by itself; the
others it would leave as they were drawn.
"""

from __future__ import annotations

from typing import cast

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

__all__ = ["encoder_head", "is_encoder_classifier", "train_head"]

_PEFTS_OWN = ("classifier", "score")
_POOLER = "pooler"  # of a body, as transformers names it


def is_encoder_classifier(model: nn.Module) -> bool:
    """Whether a model classifies whole rows by a head over an encoder; decoders with a score head do not."""
    return bool(encoder_head(model))


def encoder_head(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the head by their names, as the adapter has them; empty for any other model."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel) or inner.config.is_encoder_decoder:
        return {}
    kind = type(inner.config)
    if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return {}
    if not isinstance(inner, cast(type, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind])):
        return {}
    beside = [(name, child) for name, child in inner.named_children() if child is not inner.base_model]
    beside += [(name, child) for name, child in inner.base_model.named_children() if name == _POOLER]
    head = {name: child for name, child in beside if next(child.parameters(), None) is not None}
    return {} if "score" in head else head


def train_head(config: PeftConfig, model: nn.Module) -> None:
    """Let a configuration train and save the whole head, whatever it says."""
    if not hasattr(config, "modules_to_save"):
        return
    asked = [*(config.modules_to_save or ()), *encoder_head(model)]
    named = [name for name in dict.fromkeys(asked) if name not in _PEFTS_OWN]  # peft adds these again
    config.modules_to_save = named or None
