"""Log-probabilities of a packed batch's targets under a masked language model.

A target is hidden behind a mask and read where it stands, with everything else of its continuation in
view, before and after it. Targets of one continuation are hidden together, in one row per distinct masked
text; or one by one, in one row per target, whose sum is the pseudo-log-likelihood.

Shapes: T tokens, N targets, C continuations, R rows, L padded length, V vocabulary.

Source: Schick and Schütze 2021 for k masks at once; Salazar et al. 2020 for one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from ftlib.batches import PackedBatch
from ftlib.losses import token_logprobs
from ftlib.models.parts import inner_model
from ftlib.models.virtual import virtual_tokens

__all__ = ["Masking", "fills_masks", "masked_logprobs"]


@final
@dataclass(frozen=True)
class Masking:
    """How targets are hidden.

    Args:
        mask_id: the tokenizer's mask token.
        one_by_one: each target alone, the others in view; otherwise all of a continuation at once.
    """

    mask_id: int
    one_by_one: bool = False


def fills_masks(model: nn.Module) -> bool:
    """Whether this is a language model that sees both sides of a token: one that cannot generate."""
    inner = inner_model(model)
    return (
        inner.get_output_embeddings() is not None
        and not inner.config.is_encoder_decoder
        and not inner.can_generate()
    )


def masked_logprobs(model: nn.Module, batch: PackedBatch, masking: Masking) -> Tensor:
    """[N], nats, float32.

    Args:
        model: a masked language model, plain or with adapters.
        batch: each continuation with its prefix is one text.
        masking: how targets are hidden.
    """
    inner, virtual = inner_model(model), virtual_tokens(model)
    ids_CL, sizes_C = _rows(batch, inner.config.pad_token_id or 0)
    columns_N = batch.positions_T[batch.rows_N] + 1  # a target stands after the row that predicts it
    if masking.one_by_one:
        ids_RL, sizes_R = ids_CL[batch.owner_N], sizes_C[batch.owner_N]
        rows_N = torch.arange(len(columns_N), device=columns_N.device)
        ids_RL[rows_N, columns_N] = masking.mask_id
    else:
        ids_CL[batch.owner_N, columns_N] = masking.mask_id
        distinct, row_of_C = torch.unique(
            torch.cat([sizes_C[:, None], ids_CL], 1), dim=0, return_inverse=True
        )
        sizes_R, ids_RL = distinct[:, 0], distinct[:, 1:]
        rows_N = row_of_C[batch.owner_N]
    length = ids_RL.shape[1]
    mask_RL = torch.arange(length, device=ids_RL.device) < sizes_R[:, None]
    read: dict[str, Any] = {"input_ids": ids_RL, "attention_mask": mask_RL.long()}
    if virtual is not None:
        read, columns_N = virtual.of_encoder(inner, read), columns_N + virtual.columns
    output: Any = inner(**read)
    return token_logprobs(output.logits[rows_N, columns_N], batch.targets_N)


def _rows(batch: PackedBatch, pad: int) -> tuple[Tensor, Tensor]:
    """Each continuation after its prefix, padded on the right: int64 [C, L], and its length [C]."""
    rows = []
    for span in batch.spans:
        prefix_P = batch.ids_T[span.start : span.start + span.prefix]
        start = span.start + span.prefix
        for length in span.continuations:
            rows.append(torch.cat([prefix_P, batch.ids_T[start : start + length]]))
            start += length
    sizes_C = torch.tensor([len(row) for row in rows], device=batch.ids_T.device)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad), sizes_C
