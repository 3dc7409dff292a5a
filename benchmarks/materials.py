"""What every task prepares: adapter initialisations, the model's sizes, hashes of files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from benchmarks.jobs import adapter_folder

__all__ = ["ADAPTER", "adapter_delta", "file_sha256", "write_adapters"]

ADAPTER: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
WEIGHTS = "adapter_model.safetensors"


def write_adapters(model_folder: str, folder: Path, seeds: Iterable[int]) -> dict[str, int]:
    """One initialisation per seed, in peft's format.

    Returns:
        Sizes of the model: weights in the `body`'s matrices, in its `head`, in the `adapter`; `layers`,
        `hidden` width and `attention` = heads x head_dim.
    """
    base: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    head = base.get_output_embeddings()
    matrices = [module for module in base.modules() if isinstance(module, nn.Linear | Conv1D)]
    text = base.config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    sizes = {
        "body": sum(module.weight.numel() for module in matrices if module is not head),
        "head": head.weight.numel(),
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "attention": text.num_attention_heads * head_dim,
    }
    for pair, seed in enumerate(seeds):
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **ADAPTER))
        sizes["adapter"] = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        model.save_pretrained(str(adapter_folder(folder, pair)))
        base = model.unload()
    return sizes


def adapter_delta(folder: Path, initial: Path) -> float:
    """Euclidean distance of a saved adapter from its initialisation.

    Raises:
        ValueError: they do not hold the same tensors.
    """
    after, before = load_file(folder / WEIGHTS), load_file(initial / WEIGHTS)
    if _shapes(after) != _shapes(before):
        raise ValueError(f"{folder}: expected the tensors of {initial}, got others: {sorted(after)[:3]} ...")
    squares = [(after[name].double() - before[name].double()).square().sum() for name in before]
    return float(torch.stack(squares).sum().sqrt())


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def file_sha256(*files: Path) -> str:
    """Of the contents of some files, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
