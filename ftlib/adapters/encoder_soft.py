"""Virtual tokens in an encoder: where they have a place, and how a saved adapter says which.

An encoder that classifies reads its first token, [CLS]. ftlib puts virtual embeddings behind it,
[CLS][virtual][text]; peft puts them before it, and then pools one of them. A saved adapter of that kind
says so where peft looks for its type, so that plain peft refuses it by name and never gives other scores.
Keys and values, and virtual tokens of an encoder that fills masks, are peft's own.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from peft import PeftConfig, PeftModel
from peft.utils.peft_types import PeftType
from torch import nn
from transformers import PreTrainedModel

from ftlib.adapters.encoder_head import is_encoder_classifier
from ftlib.adapters.vetting import BEHIND, read_json
from ftlib.errors import CapabilityError

__all__ = ["read_config", "require_place", "write_place"]

_CONFIG = "adapter_config.json"


def require_place(config: PeftConfig, inner: PreTrainedModel) -> None:
    """Raise `CapabilityError` for an encoder that would pool virtual tokens, or cannot read them."""
    kind = type(inner).__name__
    if not is_encoder_classifier(inner) and inner.get_output_embeddings() is None:
        raise CapabilityError(
            f"attach: expected an encoder that classifies or fills masks for virtual tokens, got {kind}. "
            "Take ftlib.adapters.lora() or ia3()."
        )
    if config.peft_type == PeftType.PREFIX_TUNING:
        if "past_key_values" not in inspect.signature(inner.base_model.forward).parameters:
            raise CapabilityError(
                f"attach: expected an encoder that takes keys and values for a prefix, as BERT and RoBERTa "
                f"do, got {kind}. Take ftlib.adapters.prompt() or lora()."
            )
    elif is_encoder_classifier(inner) and getattr(inner.config, "classifier_pooling", "cls") != "cls":
        raise CapabilityError(
            f"attach: expected an encoder that pools its first token for virtual tokens, got {kind} with "
            f"classifier_pooling={inner.config.classifier_pooling!r}, which would pool them too. "
            "Take ftlib.adapters.lora() or ia3()."
        )


def write_place(folder: Path, model: PeftModel) -> None:
    """Mark a saved adapter whose virtual tokens stand where peft would not put them."""
    if _stands_behind(model.active_peft_config, model):
        path = folder / _CONFIG
        held = read_json(path)
        held["peft_type"] += BEHIND
        path.write_text(json.dumps(held, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_config(folder: Path, model: nn.Module) -> PeftConfig:
    """The configuration of a saved adapter.

    Raises:
        CapabilityError: virtual tokens that stood elsewhere when they were trained.
    """
    held = read_json(folder / _CONFIG)
    kind = str(held.get("peft_type"))
    if kind.endswith(BEHIND):
        held["peft_type"] = kind.removesuffix(BEHIND)
        config: PeftConfig = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**held))
    else:
        config = PeftConfig.from_pretrained(str(folder))
    if kind.endswith(BEHIND) is not _stands_behind(config, model):
        raise CapabilityError(
            f"{folder / _CONFIG}: expected virtual tokens that stand where this model has them, got "
            f"{kind!r} for {type(model).__name__}. Train them with ftlib on a model of this kind; those of "
            "plain peft stand before [CLS], and are pooled in its place."
        )
    return config


def _stands_behind(config: PeftConfig, model: nn.Module) -> bool:
    rows = config.is_prompt_learning and config.peft_type != PeftType.PREFIX_TUNING
    return rows and is_encoder_classifier(model)
