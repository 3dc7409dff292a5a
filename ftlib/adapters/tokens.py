"""New tokens: their rows of both embedding tables are trained and saved with the adapter.

A model with an output table of its own would otherwise learn to read a new token and never to write it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from ftlib.errors import ConfigError

__all__ = ["fit_new_tokens", "grow_for_tokens"]


def fit_new_tokens(config: PeftConfig, model: PreTrainedModel | PeftModel) -> None:
    """Name both tables in a configuration that lists ids of tokens; any other one is left alone.

    Raises:
        ConfigError: ids that the tables have no rows for.
    """
    ids: Any = getattr(config, "trainable_token_indices", None)
    if not isinstance(ids, list):
        return
    inner = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    read = cast(nn.Embedding, inner.get_input_embeddings())
    rows = read.weight.shape[0]
    if max(ids) >= rows or min(ids) < 0:
        raise ConfigError(
            f"lora: expected new_tokens below {rows}, the rows of the embedding table, got {max(ids)}. Make "
            "room first: model.resize_token_embeddings(len(tokenizer))."
        )
    written = inner.get_output_embeddings()
    apart = written is not None and cast(Any, written).weight is not read.weight
    tables = [read, written] if apart else [read]  # peft lets a tied table follow
    names = {id(module): name for name, module in inner.named_modules()}
    cast(Any, config).trainable_token_indices = {names[id(table)]: ids for table in tables}


def grow_for_tokens(config: PeftConfig, model: PreTrainedModel | PeftModel) -> None:
    """Give a base the rows that a saved adapter trains; their content is the adapter's own."""
    listed: Any = getattr(config, "trainable_token_indices", None) or {}
    ids = [one for each in (listed.values() if isinstance(listed, dict) else [listed]) for one in each]
    inner = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    rows = cast(nn.Embedding, inner.get_input_embeddings()).weight.shape[0]
    if ids and max(ids) >= rows:
        with torch.random.fork_rng(devices=[]):
            inner.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
