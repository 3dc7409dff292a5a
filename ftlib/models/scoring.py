"""Log-probabilities or scores of a packed batch on a planned path: flat and grouped, or padded.

    1. the body runs once, over the flat row or over one padded row per continuation; of an
       encoder-decoder, the encoder runs over the prompts first (`seq2seq.py`);
    2. a language model's head turns the scored rows, and no others, into log-probabilities; a score
       head turns the last row of each continuation into scores.

Shapes: T tokens, N scored rows, C continuations, L padded length, D hidden width, K scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast, final

import torch
from torch import Tensor, nn

from ftlib.batches import PackedBatch, Span
from ftlib.errors import ConfigError
from ftlib.models.attention import grouped_scope
from ftlib.models.checkpointing import grouped_recompute
from ftlib.models.head import Entropy, head_logprobs
from ftlib.models.layout import GroupLayout
from ftlib.models.parts import Plan, ScoreHead
from ftlib.models.seq2seq import decoder_states

__all__ = ["Scored", "hidden_states", "score"]


@final
@dataclass(frozen=True, eq=False)
class Scored:
    """What the model says of a packed batch.

    Args:
        logprobs_N: log-probability of each target, nats, at least float32; empty where they were left out.
        entropy_N: entropy of each scored row, nats; None unless asked for, detached unless as "gradient".
        last_CD: final hidden state at each continuation's last token; None unless asked for.
        scores_CK: what a score head says of each continuation, at least float32; else None.
        values_N: what a value head says of the state before each target, float32; None unless asked for.
        end_values_C: what it says of the state after each continuation; None unless asked for.
    """

    logprobs_N: Tensor
    entropy_N: Tensor | None = None
    last_CD: Tensor | None = None
    scores_CK: Tensor | None = None
    values_N: Tensor | None = None
    end_values_C: Tensor | None = None


def score(
    plan: Plan,
    batch: PackedBatch,
    *,
    value_head: nn.Module | None = None,
    detach_values: bool = False,
    temperature: float = 1.0,
    entropy: Entropy = False,
    hidden: bool = False,
    scores: bool = False,
    logprobs: bool = True,
) -> Scored:
    """The forward of a planned model; `forward` is this with the plan looked up."""
    if (scores or not logprobs) and (entropy or temperature != 1.0):
        raise ConfigError(
            "forward: entropy and temperature have no effect on scores and values. Leave them out."
        )
    valued = value_head is not None
    head = plan.require_head(scores=scores) if scores or logprobs else None
    rows_ND, last_CD = hidden_states(
        plan, batch, GroupLayout(plan.spans(batch)), last=hidden or scores or valued
    )
    if head is None:
        scored = Scored(rows_ND.new_empty(0, dtype=torch.float32))
    elif isinstance(head, ScoreHead):
        scores_CK = head.scores(cast(Tensor, last_CD))
        scored = Scored(scores_CK.new_empty(0), scores_CK=scores_CK)
    else:
        output = head_logprobs(head, rows_ND, batch.targets_N, temperature=temperature, entropy=entropy)
        scored = Scored(output.logprobs_N, output.entropy_N)
    scored = replace(scored, last_CD=last_CD if hidden else None)
    if value_head is None:
        return scored
    states = (rows_ND, cast(Tensor, last_CD))
    values_N, end_values_C = (_values(value_head, x.detach() if detach_values else x) for x in states)
    return replace(scored, values_N=values_N, end_values_C=end_values_C)


def _values(head: nn.Module, states_RD: Tensor) -> Tensor:
    """One value per state, in the head's dtype, under autocast too."""
    with torch.autocast(states_RD.device.type, enabled=False):
        values_R1: Tensor = head(states_RD.to(next(head.parameters()).dtype))
    return values_R1[:, 0]


def hidden_states(
    plan: Plan, batch: PackedBatch, layout: GroupLayout, *, last: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Hidden states of the scored rows [N, D]; and of each continuation's last token [C, D] if asked for."""
    if plan.reader is not None:
        return decoder_states(plan, batch, last=last)
    embeds_TD = None
    if plan.virtual is not None:
        plan.virtual.require_room(plan.body.config, batch.spans)
        if not plan.virtual.cached:
            batch, embeds_TD = plan.virtual.embed(plan.body, batch)
    if plan.path == "grouped":
        return _grouped_hidden(plan, batch, embeds_TD, layout, last)
    return _padded_hidden(plan, batch, embeds_TD, last)


def _grouped_hidden(
    plan: Plan, batch: PackedBatch, embeds_TD: Tensor | None, layout: GroupLayout, last: bool
) -> tuple[Tensor, Tensor | None]:
    """From one flat row."""
    with grouped_scope(plan.body.config), grouped_recompute(plan.body):
        output = plan.body(
            **_read(batch.ids_T[None], None if embeds_TD is None else embeds_TD[None]),
            position_ids=batch.positions_T[None],
            use_cache=False,
            groups=layout,
        )
    states_TD = output.last_hidden_state[0]
    last_CD = states_TD[_last_rows(batch.spans, states_TD.device)] if last else None
    return states_TD[batch.rows_N], last_CD


def _read(ids: Tensor, embeds: Tensor | None) -> dict[str, Tensor]:
    """What the body reads: tokens, or their embeddings where virtual ones are among them."""
    return {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}


def _last_rows(spans: tuple[Span, ...], device: torch.device) -> Tensor:
    rows = []
    for span in spans:
        row = span.start + span.prefix
        for length in span.continuations:
            row += length
            rows.append(row - 1)
    return torch.tensor(rows, device=device)


def _padded_hidden(
    plan: Plan, batch: PackedBatch, embeds_TD: Tensor | None, last: bool
) -> tuple[Tensor, Tensor | None]:
    """From one padded row per continuation, each with its own copy of the prefix."""
    device = batch.ids_T.device
    rows_of: list[Tensor] = []  # of each continuation: the rows of its prefix, then its own
    for span in batch.spans:
        prefix = torch.arange(span.start, span.start + span.prefix, device=device)
        row = span.start + span.prefix
        for length in span.continuations:
            rows_of.append(torch.cat([prefix, torch.arange(row, row + length, device=device)]))
            row += length
    index_CL = nn.utils.rnn.pad_sequence(rows_of, batch_first=True)
    sizes_C = torch.tensor([len(rows) for rows in rows_of], device=device)
    columns_L = torch.arange(index_CL.shape[1], device=device)
    mask_CL = columns_L[None] < sizes_C[:, None]
    arguments: dict[str, Any] = {"attention_mask": mask_CL.long(), "use_cache": False}
    first = 0
    if plan.virtual is not None and plan.virtual.cached:
        first = plan.virtual.count
        plan.virtual.require_cache(plan.body)
        arguments = {
            "attention_mask": nn.functional.pad(mask_CL.long(), (first, 0), value=1),
            "past_key_values": plan.virtual.cache(len(rows_of)),
            "use_cache": True,
        }
    if plan.takes_positions:
        arguments["position_ids"] = first + columns_L[None].expand_as(index_CL)
    read = _read(batch.ids_T[index_CL], None if embeds_TD is None else embeds_TD[index_CL])
    states_CLD = plan.body(**read, **arguments).last_hidden_state
    # a scored row belongs to one continuation: its column is its position in that row
    columns_N = batch.positions_T[batch.rows_N]
    last_CD = states_CLD[torch.arange(len(rows_of), device=device), sizes_C - 1] if last else None
    return states_CLD[batch.owner_N, columns_N], last_CD
