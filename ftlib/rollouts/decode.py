"""The decode loop: prompts of one batch, completed token by token.

    1. every distinct prompt runs once, padded on the left, and leaves its keys and values;
    2. each sample of a prompt gets a row of them;
    3. one token per row and step: the last position's logits, a draw, the next forward;
    4. a row that has ended gives its place to the last one.

Shapes: P distinct prompts, R rows, A rows still alive, L positions of the longest prompt, virtual ones among
them, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor
from transformers import DynamicCache

from ftlib.batches import Sampling
from ftlib.models.head import Head
from ftlib.models.parts import Plan
from ftlib.models.virtual import LeftPadded
from ftlib.rollouts.cache import decode_cache
from ftlib.rollouts.draw import draw

__all__ = ["Completion", "complete"]


@final
@dataclass(frozen=True, eq=False)
class Completion:
    """One row as decoded, on the CPU: ids, log-probabilities, and whether a stop string ended it."""

    ids: Tensor
    logprobs: Tensor
    stop_string: bool


@torch.no_grad()
def complete(
    plan: Plan,
    prompts: Sequence[Sequence[int]],
    prompt_of_row: Sequence[int],
    uniforms_RN: Tensor,
    room_of_row: Sequence[int],
    sampling: Sampling,
    stop_strings: Callable[[Tensor], Tensor] | None,
    poll: Callable[[], None],
) -> list[Completion]:
    """Complete one batch, in evaluation mode.

    Args:
        plan: of a language model.
        prompts: P distinct prompts, token ids.
        prompt_of_row: R indices into `prompts`.
        uniforms_RN: a stream per row, float32 on the CPU.
        room_of_row: most tokens of each row, between 1 and N.
        sampling: how to draw, and the stop ids.
        stop_strings: new tokens [A, n] to bool [A], True where a row ends in a stop string; or None.
        poll: called before every forward.
    """
    device = plan.body.device
    begun = _left_padded(plan, prompts, device)
    mask_PL, columns = begun.mask_RL, begun.mask_RL.shape[1]
    new_tokens = max(room_of_row)
    cache = decode_cache(plan.body.config, limit=columns + new_tokens, begun=begun.cache)
    poll()
    logits_PV = _last_logits(plan, cache, begun.read, mask_PL, begun.positions_RL)

    rows_R = torch.tensor(prompt_of_row, device=device)
    cache.reorder_cache(cast(torch.LongTensor, rows_R))
    # what is still alive: logits, mask with its future, next position, room, and the row it is written to
    logits_AV, position_A = logits_PV[rows_R], mask_PL.sum(-1)[rows_R]
    mask_AL = torch.nn.functional.pad(mask_PL[rows_R], (0, new_tokens), value=1)
    room_A, alive_A = torch.tensor(room_of_row, device=device), torch.arange(len(rows_R), device=device)
    uniforms_RN, stop_ids = (
        uniforms_RN.to(device),
        torch.tensor(sampling.stop_ids, dtype=torch.long, device=device),
    )

    tokens_RN = torch.zeros(len(rows_R), new_tokens, dtype=torch.long, device=device)
    wide = torch.promote_types(logits_PV.dtype, torch.float32)
    logprobs_RN = torch.zeros(len(rows_R), new_tokens, dtype=wide, device=device)
    length_R, matched_R = torch.zeros_like(rows_R), torch.zeros_like(rows_R, dtype=torch.bool)
    for step in range(new_tokens):
        token_A, logprob_A = draw(logits_AV, sampling, uniforms_RN[alive_A, step])
        tokens_RN[alive_A, step], logprobs_RN[alive_A, step] = token_A, logprob_A
        ended_A = torch.isin(token_A, stop_ids) | (room_A == step + 1)
        if stop_strings is not None:
            matched_R[alive_A] = stop_strings(tokens_RN[alive_A, : step + 1])
            ended_A |= matched_R[alive_A]
        length_R[alive_A] = step + 1
        if bool(ended_A.any()):
            kept_A = _filled(ended_A)
            if len(kept_A) == 0:
                break
            cache.reorder_cache(cast(torch.LongTensor, kept_A))
            token_A, position_A, mask_AL, room_A, alive_A = (
                each[kept_A] for each in (token_A, position_A, mask_AL, room_A, alive_A)
            )
        seen = columns + step + 1
        read = {"input_ids": token_A[:, None]}
        poll()
        logits_AV = _last_logits(plan, cache, read, mask_AL[:, :seen], position_A[:, None])
        position_A = position_A + 1
    rows = zip(tokens_RN.cpu(), logprobs_RN.cpu(), length_R.tolist(), matched_R.tolist(), strict=True)
    return [Completion(ids[:length], logprobs[:length], match) for ids, logprobs, length, match in rows]


def _last_logits(
    plan: Plan, cache: DynamicCache, read: Mapping[str, Tensor], mask_RL: Tensor, position_RL: Tensor
) -> Tensor:
    """Logits of the last position, [R, V]; the tokens join the cache."""
    positions: dict[str, Any] = {"position_ids": position_RL} if plan.takes_positions else {}
    output = plan.body(**read, attention_mask=mask_RL, past_key_values=cache, use_cache=True, **positions)
    return cast(Head, plan.head).logits(output.last_hidden_state[:, -1])


def _left_padded(plan: Plan, prompts: Sequence[Sequence[int]], device: torch.device) -> LeftPadded:
    """The prompts, behind virtual tokens if there are any; the mask comes from lengths, never from ids."""
    longest = max(map(len, prompts))
    ids_PL = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask_PL = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ids_PL, mask_PL = ids_PL.to(device), mask_PL.to(device)
    if plan.virtual is None:
        return LeftPadded(ids_PL, mask_PL)
    return plan.virtual.left_padded(plan.body, ids_PL, mask_PL)


def _filled(ended_A: Tensor) -> Tensor:
    """Which row each kept place takes: its own, or where that has ended one from the end."""
    kept = (~ended_A).nonzero()[:, 0]
    places = torch.arange(len(kept), device=ended_A.device)
    places[ended_A[: len(kept)]] = kept[kept >= len(kept)]
    return places
