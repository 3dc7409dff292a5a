"""A rollout phase: prompts to a sampler, completions to a reward, rows to a trainer.

What a trainer does with them is left to it: log-probabilities of policy and reference, values, the
penalty for a completion that never ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch

from ftlib.batches import Mean, Rollout, Sampling
from ftlib.errors import ConfigError, ShapeError
from ftlib.rollouts.rewards.protocol import Reward, RewardOut
from ftlib.rollouts.rewards.values import ONCE, Asking, reward_rows
from ftlib.rollouts.sampler import Sampled, Sampler, prompt_seeds

__all__ = ["Collected", "Prompt", "collect"]

RESERVED = ("prompts", "completions", "prompt_ids", "completion_ids", "finished")


@final
@dataclass(frozen=True)
class Prompt:
    """A prompt as ids for the model, and as it came for the reward.

    Args:
        ids: token ids, at least one.
        source: as the data hold it, a string or a message list; None gives the reward the ids.
        columns: further columns of its row, handed to the reward.

    Raises:
        ConfigError: a column by a name that the reward gets anyway.
    """

    ids: Sequence[int]
    source: str | Sequence[Mapping[str, Any]] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        taken = sorted(set(self.columns) & set(RESERVED))
        if taken:
            raise ConfigError(
                f"Prompt: expected columns other than {list(RESERVED)}, got {taken}. Rename them."
            )


@final
@dataclass(frozen=True, eq=False)
class Collected:
    """The rows of one phase, and what is worth logging of it.

    Args:
        rollouts: rows with a reward, in the order of their prompts.
        metrics: name -> `Mean` on the CPU, one element per row that was sampled.
    """

    rollouts: list[Rollout]
    metrics: Mapping[str, Mean]


def collect(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    reward: Reward,
    sampling: Sampling,
    *,
    decode: Callable[[Sequence[int]], str] | None = None,
    seed: int = 0,
    iteration: int = 0,
    places: Sequence[int] | None = None,
    asking: Asking = ONCE,
) -> Collected:
    """Complete prompts and have the completions valued.

    Args:
        sampler: draws `sampling.n` completions per prompt.
        prompts: of this rank.
        reward: see `Reward`; asked once for all rows, unless `asking` says otherwise.
        sampling: how to draw; not greedy.
        decode: completion ids, without the stop token, to text; None gives the reward the ids.
        seed: of the run.
        iteration: how many phases went before.
        places: place of each prompt in the batch over all ranks; None counts from 0. With these, a
            prompt gets the same completions on any number of ranks.
        asking: what to do about rewards that fail.

    Returns:
        The rows with a reward; the others are counted in the metric "dropped".

    Raises:
        ConfigError: greedy decoding; or top-p and top-k from a sampler that keeps no log-probabilities.
        ShapeError: a sampler that returns another number of rows.
        Exception: what sampler and reward raise; see `reward_rows`.
    """
    if sampling.greedy:
        raise ConfigError(
            "collect: expected a temperature > 0, got greedy decoding, which explores nothing. Sample with "
            "temperature=1.0."
        )
    seeds = prompt_seeds(seed, iteration, range(len(prompts)) if places is None else places)
    drawn = sampler.generate([prompt.ids for prompt in prompts], sampling, seeds)
    asked = [prompt for prompt in prompts for _ in range(sampling.n)]
    _check_drawn(drawn, len(asked), sampling)
    values = reward_rows(
        reward,
        [prompt.ids if prompt.source is None else prompt.source for prompt in asked],
        [_shown(prompt, row, decode) for prompt, row in zip(asked, drawn, strict=True)],
        _columns(asked, drawn),
        asking=asking,
    )
    rollouts = [
        _rollout(prompt, row, value, sampling)
        for prompt, row, value in zip(asked, drawn, values, strict=True)
        if value is not None
    ]
    return Collected(rollouts, _metrics(drawn, values))


def _check_drawn(drawn: Sequence[Sampled], rows: int, sampling: Sampling) -> None:
    """Before the rewards are asked for, which may be dear."""
    if len(drawn) != rows:
        raise ShapeError(f"collect: expected {rows} completions from the sampler, got {len(drawn)}.")
    if sampling.warped and any(row.logprobs is None for row in drawn):
        raise ConfigError(
            f"collect: expected log-probabilities from the sampler with top_p={sampling.top_p} and "
            f"top_k={sampling.top_k}, got none; a trainer cannot work them out. Sample with top_p=1.0 and "
            "top_k=0."
        )


def _shown(prompt: Prompt, row: Sampled, decode: Callable[[Sequence[int]], str] | None) -> Any:
    """A completion in the form its prompt came in."""
    ids = row.ids.tolist()
    if decode is None or prompt.source is None:
        return ids
    text = decode(ids[:-1] if row.stop_reason == "stop_id" else ids)
    return text if isinstance(prompt.source, str) else [{"role": "assistant", "content": text}]


def _columns(asked: Sequence[Prompt], drawn: Sequence[Sampled]) -> dict[str, list[Any]]:
    """The data's columns, None where a row has none, and those of the completions."""
    names = dict.fromkeys(name for prompt in asked for name in prompt.columns)
    return {
        **{name: [prompt.columns.get(name) for prompt in asked] for name in names},
        "prompt_ids": [list(prompt.ids) for prompt in asked],
        "completion_ids": [row.ids.tolist() for row in drawn],
        "finished": [row.finished for row in drawn],
    }


def _rollout(prompt: Prompt, row: Sampled, value: RewardOut, sampling: Sampling) -> Rollout:
    return Rollout(
        prompt_ids=torch.as_tensor(prompt.ids, dtype=torch.int64),
        completion_ids=row.ids,
        mask=row.mask,
        finished=row.finished,
        score=value.score,
        token_rewards=value.token_rewards,
        sampler_logprobs=row.logprobs,
        sampling=sampling,
        info={**_numbers(value), "stop_reason": row.stop_reason, "version": row.version},
    )


def _numbers(value: RewardOut) -> dict[str, float]:
    """What a reward told beside its worth, without tensors and numbers of other libraries."""
    return {name: float(number) for name, number in value.info.items()}


def _metrics(drawn: Sequence[Sampled], values: Sequence[RewardOut | None]) -> dict[str, Mean]:
    """Means over the rows; those of rewards over the rows that have one."""
    given = [value for value in values if value is not None]
    logged: dict[str, list[float]] = {
        "dropped": [float(value is None) for value in values],
        "finished": [float(row.finished) for row in drawn],
        "completion_tokens": [float(len(row.ids)) for row in drawn],
        "score": [value.score for value in given if value.score is not None],
    }
    for value in given:
        for name, number in _numbers(value).items():
            logged.setdefault(f"reward/{name}", []).append(number)
    return {
        name: Mean(torch.tensor(sum(numbers)), torch.tensor(float(len(numbers))))
        for name, numbers in logged.items()
        if numbers
    }
