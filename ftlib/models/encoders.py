"""Classifiers over encoders: a padded row per example through the model's own forward, its pooling included.

What an encoder pools ([CLS], a mean, an attention over states) and what follows it (dropout, one layer or
two) is its architecture's own, so its class for sequence classification computes all of it. Positions are
left to the model too: RoBERTa's begin behind its padding id and count what is no padding. Virtual tokens
stand behind the first token, [CLS][virtual][text], or before it as keys and values, so it is still the first.

The prefix of an example is the first segment of its row, the continuation the second (BERT's token types).

Shapes: C continuations, L padded length, K scores.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftlib.batches import PackedBatch, Span
from ftlib.errors import CapabilityError
from ftlib.models.modes import evaluation_mode
from ftlib.models.parts import Path, inner_model
from ftlib.models.virtual import VirtualTokens, virtual_tokens

__all__ = ["encoder_scores", "first_position", "require_scores_alone"]

logger = logging.getLogger(__name__)
_checked: WeakSet[nn.Module] = WeakSet()


def encoder_scores(model: nn.Module, batch: PackedBatch) -> Tensor:
    """The scores of each continuation with its prefix before it, at least float32 [C, K].

    Args:
        model: with `adapters.encoder_head`, plain or with adapters.
        batch: on the model's device; no two continuations share a prefix.

    Raises:
        CapabilityError: its scores depend on what else is in the batch.
    """
    inner = inner_model(model)
    virtual = virtual_tokens(model)
    if model not in _checked:
        _check(model, inner, virtual, batch.ids_T.device)
        _checked.add(model)
        logger.info("%s takes the padded path: it is an encoder, and pools by itself", type(inner).__name__)
    scores_CK = _scores(inner, batch, virtual)
    return scores_CK.to(torch.promote_types(scores_CK.dtype, torch.float32))


def require_scores_alone(model: nn.Module, beside: Sequence[str], scores: bool, path: Path | None) -> None:
    """Raise `CapabilityError` where an encoder is asked for anything but its scores, in any other way.

    Args:
        model: with a head over an encoder.
        beside: names of what else was asked for.
        scores: whether scores were.
        path: asked for; None for any.
    """
    asked = [
        *beside,
        *(() if scores else ("log-probabilities",)),
        *(["path='grouped'"] if path == "grouped" else ()),
    ]
    if asked:
        raise CapabilityError(
            f"forward: expected scores=True alone for the encoder {type(inner_model(model)).__name__}, which "
            f"gives the scores of padded rows and nothing else, got {', '.join(asked)}. Leave that out, or "
            "take a causal language model."
        )


def first_position(inner: PreTrainedModel) -> int:
    """How many of a model's positions stand before the first token: RoBERTa's padding id and those below."""
    for name, module in inner.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _scores(inner: PreTrainedModel, batch: PackedBatch, virtual: VirtualTokens | None) -> Tensor:
    rows = [row for span in batch.spans for row in _rows(span, batch.ids_T)]
    pad = inner.config.get_text_config().pad_token_id
    ids_CL = nn.utils.rnn.pad_sequence(
        [torch.cat(row) for row in rows], batch_first=True, padding_value=float(pad or 0)
    )
    device = ids_CL.device
    sizes_C = torch.tensor([sum(map(len, row)) for row in rows], device=device)
    columns_L = torch.arange(ids_CL.shape[1], device=device)
    arguments = {"input_ids": ids_CL, "attention_mask": (columns_L < sizes_C[:, None]).long()}
    if _takes_segments(inner):
        # a row without a prefix is one segment, the first
        begins_C = torch.tensor([len(first) or len(own) for first, own in rows], device=device)
        arguments["token_type_ids"] = (columns_L >= begins_C[:, None]).long() * arguments["attention_mask"]
    read = arguments if virtual is None else virtual.of_encoder(inner, arguments, first=1)
    scores_CK: Tensor = inner(**read).logits
    return scores_CK


def _rows(span: Span, ids_T: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(prefix, own) ids of each continuation."""
    prefix, row = ids_T[span.start : span.start + span.prefix], span.start + span.prefix
    rows = []
    for length in span.continuations:
        rows.append((prefix, ids_T[row : row + length]))
        row += length
    return rows


def _takes_segments(inner: PreTrainedModel) -> bool:
    kinds = getattr(inner.config.get_text_config(), "type_vocab_size", None)
    return (kinds or 0) > 1 and "token_type_ids" in inspect.signature(inner.forward).parameters


def _check(
    model: nn.Module, inner: PreTrainedModel, virtual: VirtualTokens | None, device: torch.device
) -> None:
    """Two rows of unlike length, together and each by itself without a mask."""
    vocabulary = cast(nn.Embedding, inner.get_input_embeddings()).num_embeddings
    pad = inner.config.get_text_config().pad_token_id
    known = torch.tensor([one for one in range(min(vocabulary, 64)) if one != pad], device=device)
    ids_T = known[torch.arange(7, device=device) * 5 % len(known)]
    flat = torch.zeros_like(ids_T)
    batch = PackedBatch(ids_T, flat, (Span(0, 0, (5,)), Span(5, 0, (2,))), flat, flat, flat.float(), flat)
    exact = torch.autocast(device.type, enabled=False)
    with evaluation_mode(model), torch.no_grad(), exact:
        found_CK = _scores(inner, batch, virtual).float()
        own_CK = torch.cat([_alone(inner, ids_T[None, cut], virtual) for cut in (slice(5), slice(5, 7))])
    error = float((found_CK - own_CK).norm()) / max(float(own_CK.norm()), torch.finfo(torch.float32).tiny)
    if not error <= torch.finfo(found_CK.dtype if inner.dtype == torch.float32 else inner.dtype).eps ** 0.5:
        raise CapabilityError(
            f"forward: expected scores of a row that padding leaves alone, got {type(inner).__name__}, whose "
            f"scores differ by {error:.2g} of their size. Take BERT, RoBERTa, DistilBERT or ModernBERT."
        )


def _alone(inner: PreTrainedModel, ids_1L: Tensor, virtual: VirtualTokens | None) -> Tensor:
    """The scores of one row."""
    if virtual is None:
        return cast(Tensor, inner(input_ids=ids_1L).logits).float()
    arguments = {"input_ids": ids_1L, "attention_mask": torch.ones_like(ids_1L)}
    return cast(Tensor, inner(**virtual.of_encoder(inner, arguments, first=1)).logits).float()
