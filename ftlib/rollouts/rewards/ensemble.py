"""Several rewards as one.

    mean      m = (r_1 + ... + r_n) / n
    min       the smallest
    mean-std  m - sqrt(sum_i (r_i - m)^2 / n)

The last two distrust what the members disagree on. Source: Coste et al. 2023 (arXiv:2310.02743), section
3.2, with the standard deviation in place of the variance.

Shapes: M members.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, cast, final

import torch
from torch import Tensor

from ftlib.checks import Wanted, check, one_of
from ftlib.errors import ShapeError
from ftlib.rollouts.rewards.protocol import Item, Reward, RewardOut
from ftlib.rollouts.rewards.values import call_reward, value_of

__all__ = ["Reduce", "ensemble"]

Reduce = Literal["mean", "min", "mean-std"]
MEMBERS = Wanted(
    "a list of rewards, or a dict of them by name, not empty",
    lambda value: isinstance(value, list | tuple | Mapping) and bool(value),
)
_REDUCE: dict[Reduce, Callable[[Tensor], Tensor]] = {
    "mean": lambda members_M: members_M.mean(0),
    "min": lambda members_M: members_M.amin(0),
    "mean-std": lambda members_M: members_M.mean(0) - members_M.std(0, correction=0),
}


def ensemble(
    members: Sequence[Reward] | Mapping[str, Reward], reduce: Reduce = "mean", *, skip_none: bool = False
) -> Reward:
    """Several rewards as one; every member's score is logged under its own name.

    Args:
        members: reward functions; a mapping gives them names, else they keep their own.
        reduce: "mean", "min", or "mean-std" with the population's standard deviation.
        skip_none: reduce over the members that gave a reward; False leaves a row out as soon as one
            member gave none.

    Raises:
        ConfigError: no member, or an unknown `reduce`.

    Example:
        >>> one, two = lambda prompts, completions: [1.0], lambda prompts, completions: [2.0]
        >>> ensemble([one, two], reduce="min")(["?"], ["!"])[0].score
        1.0
    """
    check("ensemble", {"members": (members, MEMBERS), "reduce": (reduce, one_of(Reduce))})
    named = dict(members) if isinstance(members, Mapping) else _named(members)
    return _Ensemble(named, reduce, skip_none)


def _named(members: Sequence[Reward]) -> dict[str, Reward]:
    """Members by their function's name, with a number where a name is taken."""
    named: dict[str, Reward] = {}
    for index, member in enumerate(members):
        name = getattr(member, "__name__", type(member).__name__)
        named[f"{name}_{index}" if name in named or name == "<lambda>" else name] = member
    return named


@final
class _Ensemble:
    def __init__(self, members: dict[str, Reward], reduce: Reduce, skip_none: bool) -> None:
        self._members, self._reduce, self._skip_none = members, _REDUCE[reduce], skip_none

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Sequence[Item] | Awaitable[Sequence[Item]]:
        """One item per row; awaitable if a member is."""
        asked = [call_reward(member, prompts, completions, columns) for member in self._members.values()]
        lengths = [len(ids) for ids in columns.get("completion_ids", [()] * len(prompts))]
        if not any(inspect.isawaitable(each) for each in asked):
            return self._reduced(asked, lengths)

        async def gathered() -> Sequence[Item]:
            waiting = [index for index, each in enumerate(asked) if inspect.isawaitable(each)]
            answers = await asyncio.gather(*(asked[index] for index in waiting))
            for index, answer in zip(waiting, answers, strict=True):
                asked[index] = answer
            return self._reduced(asked, lengths)

        return gathered()

    def _reduced(self, answers: Sequence[Sequence[Any]], lengths: Sequence[int]) -> Sequence[Item]:
        for name, answer in zip(self._members, answers, strict=True):
            if len(answer) != len(lengths):
                raise ShapeError(
                    f"ensemble: expected {len(lengths)} items from {name!r}, one per row, got {len(answer)}."
                )
        return [
            self._row([value_of(item, length, row) for item in items])
            for row, (items, length) in enumerate(zip(zip(*answers, strict=True), lengths, strict=True))
        ]

    def _row(self, values: Sequence[RewardOut | None]) -> RewardOut | None:
        given = {name: value for name, value in zip(self._members, values, strict=True) if value is not None}
        if not given or (len(given) < len(values) and not self._skip_none):
            return None
        scores = [value.score for value in given.values()]
        tokens = [value.token_rewards for value in given.values()]
        if _mixed(scores) or _mixed(tokens):
            raise ShapeError(
                f"ensemble: expected rewards of one kind, got scores and token rewards from {sorted(given)}."
            )
        info = {
            f"{name}/{key}": number for name, value in given.items() for key, number in value.info.items()
        }
        score = None
        if scores[0] is not None:
            info |= dict(zip(given, cast(list[float], scores), strict=True))
            score = float(self._reduce(torch.tensor(scores, dtype=torch.float64)))
        rewards = None if tokens[0] is None else self._reduce(torch.stack(cast(list[Tensor], tokens)))
        return RewardOut(score, rewards, info)


def _mixed(parts: Sequence[Any]) -> bool:
    return len({part is None for part in parts}) > 1
