"""Rollouts from what a caller of `PPOTrainer.step` has: texts or ids, and rewards of any kind.

Shapes: L tokens of one response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ftlib.batches import Mean, Rollout, Sampling
from ftlib.errors import ShapeError
from ftlib.rollouts.rewards.values import value_of

__all__ = ["given_rollouts", "mean_reward", "reward_of"]


def given_rollouts(
    queries: Sequence[Any],
    responses: Sequence[Any],
    rewards: Sequence[Any],
    *,
    masks: Sequence[Any] | None,
    finished: Sequence[bool] | None,
    logprobs: Sequence[Any] | None,
    sampling: Sampling,
    query_ids: Callable[[str], Sequence[int]],
    response_ids: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str] | None = None,
) -> list[Rollout]:
    """One rollout per row that has a reward; see `PPOTrainer.step`.

    Args:
        queries: strings, token ids or tensors.
        responses: likewise.
        rewards: as a reward function gives them, or lists of token rewards.
        masks: one per row, or None.
        finished: likewise.
        logprobs: likewise.
        sampling: how the responses were drawn; its stop ids and strings tell which of them ended.
        query_ids: encodes a query that is a string.
        response_ids: likewise.
        decode: ids to text, to find stop strings in responses that are ids.

    Raises:
        ShapeError: arguments of different lengths, token rewards that are not [L], an empty response, or
            one that goes on after its stop token.
        DataError: an item that is no reward.
        NonFiniteError: rewards that are NaN or infinite.
    """
    columns = {"responses": responses, "rewards": rewards, "masks": masks, "finished": finished}
    columns["logprobs"] = logprobs
    wrong = {name: len(column) for name, column in columns.items() if column is not None}
    wrong = {name: length for name, length in wrong.items() if length != len(queries)}
    if wrong:
        raise ShapeError(
            f"step: expected one item per query ({len(queries)}), got "
            f"{', '.join(f'{length} {name}' for name, length in wrong.items())}."
        )
    made = []
    for row, (query, response, reward) in enumerate(zip(queries, responses, rewards, strict=True)):
        completion_ids = _ids(response, response_ids)
        mask_L = torch.ones_like(completion_ids) if masks is None else torch.as_tensor(masks[row])
        _check_end(completion_ids, mask_L.bool(), sampling, row)
        item = torch.tensor(reward) if isinstance(reward, list | tuple) else reward
        value = value_of(item, len(completion_ids), row)
        if value is None:
            continue
        if len(completion_ids) == 0:
            raise ShapeError(
                f"step: expected at least one token in response {row} (counted from 0), got none: a text "
                "does not hold the stop token that was drawn. Give token ids, or None as its reward."
            )
        text = (
            response
            if isinstance(response, str)
            else None
            if decode is None
            else decode(completion_ids.tolist())
        )
        ended = (
            _ended(completion_ids, mask_L.bool(), text, sampling) if finished is None else bool(finished[row])
        )
        made.append(
            Rollout(
                _ids(query, query_ids),
                completion_ids,
                mask_L.bool(),
                ended,
                score=value.score,
                token_rewards=value.token_rewards,
                sampler_logprobs=None if logprobs is None else torch.as_tensor(logprobs[row]).float(),
                sampling=sampling,
                info=value.info,
            )
        )
    return made


def mean_reward(rollouts: Sequence[Rollout]) -> Mean:
    """What the rows were worth as it was given: their scores and the sums of their token rewards."""
    return Mean(torch.tensor(sum(map(reward_of, rollouts))), torch.tensor(float(len(rollouts))))


def reward_of(rollout: Rollout) -> float:
    """What a row was worth as it was given: its score and the sum of its token rewards."""
    tokens = rollout.token_rewards
    return (rollout.score or 0.0) + (0.0 if tokens is None else float(tokens[rollout.mask].sum()))


def _ids(given: Any, encode: Callable[[str], Sequence[int]]) -> Tensor:
    """Token ids int64 [L] on the CPU."""
    return torch.as_tensor(encode(given) if isinstance(given, str) else given).to("cpu", torch.int64)


def _ended(ids_L: Tensor, mask_L: Tensor, text: str | None, sampling: Sampling) -> bool:
    """Whether the last sampled token, or the text, ends a completion; `Rollout` refuses a row without one."""
    sampled = ids_L[mask_L].tolist() if mask_L.shape == ids_L.shape else []
    stopped = any(token in sampling.stop_ids for token in sampled[-1:])
    return not sampling.can_stop or stopped or (text or "").endswith(tuple(sampling.stop_strings))


def _check_end(ids_L: Tensor, mask_L: Tensor, sampling: Sampling, row: int) -> None:
    """Nothing is sampled right after a stop token: what stands there is padding, and would be trained on."""
    if mask_L.shape != ids_L.shape:  # refused by `Rollout`
        return
    stops_L = mask_L & torch.isin(ids_L, ids_L.new_tensor(sampling.stop_ids))
    more = (stops_L[:-1] & mask_L[1:]).nonzero()
    if len(more):
        first = int(more[0])
        raise ShapeError(
            f"step: expected response {row} (counted from 0) to end at its stop token, got "
            f"{len(ids_L) - first - 1} tokens after it, at place {first}. Cut padding off; what follows in a "
            "further turn, and was not sampled, has masks False."
        )
