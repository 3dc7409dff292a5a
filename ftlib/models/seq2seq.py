"""Hidden states of an encoder-decoder: each prompt encoded once, each of its continuations decoded.

    encoder(prompt)                          one row per group
    decoder(start, y_1, ..., y_{L-1})        one row per continuation: the states that predict y_1, ..., y_L

A packed batch names, for every scored token, the row of the token before it. Before the first token of a
continuation that is the prompt's last one, in whose place the decoder reads its start token. Rows are padded
on the right and masked by their lengths; a pad is never compared with an id.

Shapes: G groups, C continuations, N scored rows, P and L longest prompt and continuation, D hidden width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ftlib.batches import PackedBatch
from ftlib.errors import DataError
from ftlib.models.parts import Plan, Reader

__all__ = ["decoder_states"]


def decoder_states(plan: Plan, batch: PackedBatch, *, last: bool) -> tuple[Tensor, Tensor | None]:
    """States of the scored rows [N, D], and those after each continuation's last token [C, D] if asked for.

    Args:
        plan: of an encoder-decoder.
        batch: every group with a prompt, of which nothing is scored.
        last: the decoder reads the last tokens too, for what stands after them.

    Raises:
        DataError: a group without a prompt, or with a scored token in it.
    """
    reader, device = cast(Reader, plan.reader), batch.ids_T.device
    _require_prompts(batch)
    lengths = [length for span in batch.spans for length in span.continuations]
    # 1. each prompt once, behind its virtual tokens
    embeds_TD = None
    if plan.virtual is not None:
        batch, embeds_TD = plan.virtual.embed(reader.module, batch)
    encoded_GPD, mask_GP = _encoded(reader, batch, embeds_TD)
    # 2. each continuation behind the start token, beside its prompt
    group_C = torch.tensor([g for g, span in enumerate(batch.spans) for _ in span.continuations]).to(device)
    answers_CL = batch.ids_T[_rows_of_continuations(batch).to(device)]
    start_C1 = answers_CL.new_full((len(lengths), 1), reader.start_id)
    read_CL = torch.cat([start_C1, answers_CL if last else answers_CL[:, :-1]], dim=1)
    decoded_CLD = plan.body(
        input_ids=read_CL,
        encoder_hidden_states=encoded_GPD[group_C],
        encoder_attention_mask=mask_GP[group_C],
        use_cache=False,
    ).last_hidden_state
    # 3. the state before each target
    prompt_C = torch.tensor([span.prefix for span in batch.spans]).to(device)[group_C]
    columns_N = batch.positions_T[batch.rows_N] + 1 - prompt_C[batch.owner_N]
    if bool((columns_N < 0).any()):
        raise DataError(
            "forward: expected an encoder-decoder's prompts to be read only, got loss weights on their "
            "tokens, which it never predicts. Encode with prompt_loss_weight=0 and "
            'train_on="completion" or "last".',
            code="trained_prompt",
        )
    ends_C = torch.tensor(lengths).to(device)
    last_CD = decoded_CLD[torch.arange(len(lengths), device=device), ends_C] if last else None
    return decoded_CLD[batch.owner_N, columns_N], last_CD


def _require_prompts(batch: PackedBatch) -> None:
    empty = sum(span.prefix == 0 for span in batch.spans)
    if empty:
        raise DataError(
            f"forward: expected a prompt in every group for an encoder-decoder, got {empty} without one: it "
            "has nothing to encode. Give rows with prompt and completion.",
            code="no_prompt",
        )


def _encoded(reader: Reader, batch: PackedBatch, embeds_TD: Tensor | None) -> tuple[Tensor, Tensor]:
    """The encoder's states [G, P, D], of embeddings if these are given; and the mask, int64 [G, P]."""
    rows_GP = pad_sequence(
        [torch.arange(span.start, span.start + span.prefix) for span in batch.spans], batch_first=True
    )
    sizes_G = torch.tensor([span.prefix for span in batch.spans])
    mask_GP = torch.arange(rows_GP.shape[1])[None] < sizes_G[:, None]
    rows_GP, mask_GP = (each.to(batch.ids_T.device) for each in (rows_GP, mask_GP.long()))
    read = {"input_ids": batch.ids_T[rows_GP]} if embeds_TD is None else {"inputs_embeds": embeds_TD[rows_GP]}
    return reader.module(**read, attention_mask=mask_GP).last_hidden_state, mask_GP


def _rows_of_continuations(batch: PackedBatch) -> Tensor:
    """Where the tokens of each continuation lie in the batch, int64 [C, L], any row where there is none."""
    rows = []
    for span in batch.spans:
        row = span.start + span.prefix
        for length in span.continuations:
            rows.append(torch.arange(row, row + length))
            row += length
    return pad_sequence(rows, batch_first=True)
