"""What a model computes with, as hashes that are the same in every process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedConfig

from ftlib.adapters.stacked import beneath
from ftlib.models.sharding import whole

__all__ = ["PROVENANCE", "adapter_settings", "config_settings", "hash_settings", "hash_tensors"]

# Of a peft configuration: where it came from and what it is used for, not what it computes.
PROVENANCE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")
_TOKENS = "trainable_token_indices"
_OF_A_MODEL = ("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache")


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names and bytes, in the order of the names. Of pieces, every rank takes part."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(name.encode())
        digest.update(whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_settings(settings: Mapping[str, Any]) -> str:
    """SHA-256 over nested settings: sets sorted, functions and objects by their name."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=_by_name).encode()).hexdigest()


def config_settings(config: PreTrainedConfig | PeftConfig) -> dict[str, Any]:
    """A configuration less what says where it came from and not what is computed."""
    left_out = PROVENANCE if isinstance(config, PeftConfig) else _OF_A_MODEL
    held = config.to_dict()
    if isinstance(config, PeftConfig) and _TOKENS in vars(config):  # not a field of every kind
        held[_TOKENS] = vars(config)[_TOKENS]
    return {name: value for name, value in held.items() if name not in left_out}


def adapter_settings(model: PeftModel, name: str) -> dict[str, Any]:
    """`config_settings` of an adapter, and of the weights under it if there are any."""
    own, below = config_settings(model.peft_config[name]), beneath(model, name)
    return own if below is None else {**own, "beneath": config_settings(below)}


def _by_name(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return getattr(value, "__qualname__", type(value).__qualname__)
