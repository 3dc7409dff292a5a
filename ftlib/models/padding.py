"""The pad id of a model that scores: one that no row ends in.

transformers pools the last token that is not the pad id, so with the usual pad == eos it reads the state
before the terminator. ftlib reads by length; this choice is for those who load the model without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import cast

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftlib.adapters.task import score_head
from ftlib.models.parts import inner_model

__all__ = ["choose_pad_id", "endings", "padding_tokenizer"]

NEW_PAD = "<|pad|>"
_IDLE_NAMES = ("pad", "reserved", "unused")
_LAST_BYTE = ("<0xFF>", "ÿ")  # of a byte fallback, and in the alphabet of byte-level BPE


def endings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """Special ids that rows end in: every stop id of config, generation config and tokenizer, and unk."""
    text = model.config.get_text_config(decoder=True)
    written = model.generation_config if model.can_generate() else None
    found = [getattr(owner, "eos_token_id", None) for owner in (text, written, tokenizer)]
    found += [getattr(tokenizer, "unk_token_id", None)]
    listed = [ids if isinstance(ids, list | tuple) else [ids] for ids in found]
    return {int(one) for ids in listed for one in ids if one is not None}


def choose_pad_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The first of these that ends no row and has an embedding; None where there is none.

    1. the tokenizer's own pad token, then the one of the model's config;
    2. an added token named pad, reserved or unused;
    3. the first embedding past the tokenizer's vocabulary;
    4. BOS, which begins rows;
    5. the byte 0xFF, which is in no UTF-8 text.
    """
    ending = endings(model, tokenizer)
    rows = len(cast(nn.Embedding, model.get_input_embeddings()).weight)
    own = model.config.get_text_config(decoder=True).pad_token_id
    candidates = (own,) if tokenizer is None else _candidates(tokenizer, own)
    return next(
        (one for one in candidates if one is not None and 0 <= one < rows and one not in ending), None
    )


def _candidates(tokenizer: PreTrainedTokenizerBase, own: int | None) -> Iterator[int | None]:
    added, vocabulary = tokenizer.added_tokens_decoder, tokenizer.get_vocab()
    yield tokenizer.pad_token_id
    yield own if own in added else None  # many configs say 0, which is "!" for GPT-2's tokenizer
    yield from (
        one for one in sorted(added) if any(name in added[one].content.lower() for name in _IDLE_NAMES)
    )
    yield max(vocabulary.values()) + 1
    yield tokenizer.bos_token_id
    written = tokenizer("ÿ", add_special_tokens=False).input_ids  # not bytes but a letter, elsewhere
    yield from (vocabulary[token] for token in _LAST_BYTE if vocabulary.get(token) not in (None, *written))


def padding_tokenizer(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase:
    """The tokenizer to ship with a model: of one that scores, a copy that pads with its pad id.

    Where that id cannot be a pad token without changing how text is split, the copy has none, and padding
    raises instead of giving other scores.
    """
    if score_head(model) is None:
        return tokenizer
    pad = inner_model(model).config.get_text_config(decoder=True).pad_token_id
    if tokenizer.pad_token_id == pad:
        return tokenizer
    copy = deepcopy(tokenizer)
    added = copy.added_tokens_decoder
    copy.pad_token = None
    if pad in added:
        copy.pad_token = added[pad].content
    elif pad is not None and pad == max(copy.get_vocab().values()) + 1:
        copy.add_special_tokens({"pad_token": NEW_PAD})
    return copy
