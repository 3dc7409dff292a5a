"""New tokens whose rows are trained: soft tokens in a template, soft words for classes.

They are ordinary rows of the embeddings (and of the head) of an ordinary model, and peft trains them. The
tokenizer is copied, the model gets its new rows in place. A saved adapter holds what they became; a base to
put it on needs as many rows: this function again, or transformers' `resize_token_embeddings`.

Source: Lester et al. 2021, Liu et al. 2021 (soft tokens anywhere), Hambardzumyan et al. 2021 (soft words).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import cast

import torch
from peft import PeftModel, TrainableTokensConfig
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftlib.adapters.adapter import Adapter
from ftlib.adapters.attach import AnyModel, attach
from ftlib.adapters.tokens import with_new_tokens
from ftlib.errors import CapabilityError

__all__ = ["add_soft_tokens"]

FREQUENT = 5000  # ids below this are frequent tokens, in vocabularies as they are trained


def add_soft_tokens(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Mapping[str, str | None],
    *,
    adapter: Adapter | None = None,
    seed: int = 0,
) -> tuple[AnyModel, PreTrainedTokenizerBase]:
    """A model and a tokenizer with some more tokens, whose rows are trained.

    Args:
        model: a plain language model, given new rows in place.
        tokenizer: copied.
        tokens: token -> words to start from, or None for a frequent token drawn by `seed`. Of several
            tokens with the same words, each starts from one token of these, in order; one token alone
            from their mean.
        adapter: what is trained beside, of any kind; `adapters.full()` trains every weight, None the new
            rows alone.
        seed: of what is drawn.

    Raises:
        CapabilityError: a model with an adapter on it already.
    """
    if isinstance(model, PeftModel):
        raise CapabilityError(
            "add_soft_tokens: expected a plain model, got one with adapters. Merge them first, or give the "
            "adapter here: adapter=."
        )
    starts = _starts(tokenizer, tokens, seed)  # by the tokenizer as it is
    tokenizer = deepcopy(tokenizer)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    ids = cast(list[int], tokenizer.convert_tokens_to_ids(list(tokens)))
    _grow(model, max(ids) + 1)
    for table in _tables(model).values():
        with torch.no_grad():
            for index, start in zip(ids, starts, strict=True):
                _set_row(table, index, start)
    with warnings.catch_warnings():  # peft ties the rows of tied tables, and warns that it does not
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        if adapter is None:
            alone = TrainableTokensConfig(token_indices=ids, target_modules=list(_tables(model)))
            return attach(model, alone), tokenizer
        if adapter.config is None:
            return attach(model, adapter), tokenizer
        config = deepcopy(adapter.config)
        with_new_tokens(config, ids, "add_soft_tokens")
        return attach(model, replace(adapter, config=config), tokenizer=tokenizer), tokenizer


def _starts(
    tokenizer: PreTrainedTokenizerBase, tokens: Mapping[str, str | None], seed: int
) -> list[list[int]]:
    """The ids whose mean each new row starts from."""
    special = set(tokenizer.all_special_ids)
    ordinary = [index for index in range(min(FREQUENT, len(tokenizer))) if index not in special]
    generator = torch.Generator().manual_seed(seed)
    alike: dict[str, int] = {}
    for words in tokens.values():
        if words is not None:
            alike[words] = alike.get(words, 0) + 1
    starts, used = [], dict.fromkeys(alike, 0)
    for words in tokens.values():
        if words is None:
            starts.append([ordinary[int(torch.randint(len(ordinary), (), generator=generator))]])
            continue
        ids = tokenizer(f" {words}", add_special_tokens=False)["input_ids"]
        if alike[words] > 1:
            ids, used[words] = [ids[used[words] % len(ids)]], used[words] + 1
        starts.append(list(ids))
    return starts


def _tables(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The embeddings and, where it is another matrix, the head, by their names in the model."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tables = {names[id(embeddings)]: embeddings}
    if head is not None and head.weight is not embeddings.weight:
        tables[names[id(head)]] = head
    return tables


def _grow(model: PreTrainedModel, rows: int) -> None:
    if rows > len(cast(Tensor, model.get_input_embeddings().weight)):
        model.resize_token_embeddings(rows, mean_resizing=False)


def _set_row(table: nn.Module, index: int, start: list[int]) -> None:
    """One row, and its bias, as the mean of others."""
    for values in (table.weight, getattr(table, "bias", None)):
        if values is not None:
            values = cast(Tensor, values)
            values[index] = values[start].mean(0)
