"""The rewards of rows: asked for, checked, and counted where there are none.

A reward that fails is never a number: it is raised, or the row is left out and counted.

Shapes: L tokens of one completion.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, final, get_args

import numpy as np
import torch
from torch import Tensor

from ftlib.errors import ConfigError, DataError, NonFiniteError, ShapeError
from ftlib.rollouts.rewards.calls import wait_for
from ftlib.rollouts.rewards.protocol import Reward, RewardOut

__all__ = ["ONCE", "Asking", "call_reward", "reward_rows", "value_of"]

OnError = Literal["raise", "drop"]


@final
@dataclass(frozen=True)
class Asking:
    """How to ask for rewards.

    Args:
        retries: further tries after an exception, >= 0.
        retry_delay: seconds before the first of them, doubled for each; >= 0.
        timeout: seconds for one call, > 0; None waits for ever. A call that is late counts as failed.
        on_error: when every try has failed, "raise" the exception or "drop" the rows of that call.
        max_drop_frac: most rows that may be left out, as a share of those asked for, in [0, 1].
        batch_size: rows of one call; None asks for all at once.

    Raises:
        ConfigError: a value out of range.
    """

    retries: int = 0
    retry_delay: float = 1.0
    timeout: float | None = None
    on_error: OnError = "raise"
    max_drop_frac: float = 0.1
    batch_size: int | None = None

    def __post_init__(self) -> None:
        asked = {
            "retries >= 0": self.retries >= 0,
            "retry_delay >= 0": self.retry_delay >= 0,
            "timeout None or > 0": self.timeout is None or self.timeout > 0,
            f"on_error one of {list(get_args(OnError))}": self.on_error in get_args(OnError),
            "0 <= max_drop_frac <= 1": 0 <= self.max_drop_frac <= 1,
            "batch_size None or >= 1": self.batch_size is None or self.batch_size >= 1,
        }
        failed = [rule for rule, holds in asked.items() if not holds]
        if failed:
            raise ConfigError(f"Asking: expected {' and '.join(failed)}, got {self}.")


ONCE = Asking()


def reward_rows(
    reward: Reward,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    *,
    asking: Asking = ONCE,
) -> list[RewardOut | None]:
    """What each row is worth; None where there is no reward.

    Args:
        reward: the function to ask.
        prompts: one per row, strings or message lists.
        completions: one per row, in the same form.
        columns: name -> one value per row; ``completion_ids`` gives the number of tokens.
        asking: what to do about failures.

    Raises:
        ShapeError: not one item per row, or token rewards of another length than the completion; the
            rows are named, counted from 0.
        NonFiniteError: NaN or infinite rewards; the rows are named.
        DataError: an item that is no reward, or more rows left out than `max_drop_frac`.
        Exception: whatever the function raises, with `on_error="raise"`.
    """
    rows = len(prompts)
    size = max(asking.batch_size or rows, 1)
    values: list[RewardOut | None] = []
    for start in range(0, rows, size):
        part = slice(start, start + size)
        some = {name: column[part] for name, column in columns.items()}
        items = _asked(reward, prompts[part], completions[part], some, asking, start)
        lengths = [len(ids) for ids in some["completion_ids"]]
        values += [
            value_of(item, length, row)
            for row, (item, length) in enumerate(zip(items, lengths, strict=True), start)
        ]
    _check_finite(values)
    dropped = [row for row, value in enumerate(values) if value is None]
    if len(dropped) > asking.max_drop_frac * rows:
        raise DataError(
            f"expected a reward for all but {asking.max_drop_frac:.0%} of the rows, got none for "
            f"{len(dropped)} of {rows}: {_named(dropped)} (counted from 0). Look at what the reward makes of "
            "them, or raise max_drop_frac.",
            code="rewards_missing",
            file="<reward>",
        )
    return values


def call_reward(
    reward: Reward, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
) -> Any:
    """Call a reward with the arguments it takes; what it returns may be awaitable.

    Arguments go by name; to a function with other names, prompts and completions go by position.
    """
    parameters = inspect.signature(reward).parameters
    given = {"prompts": prompts, "completions": completions, **columns}
    strange = [each for each in parameters.values() if _positional(each) and each.name not in given]
    if not any(each.kind == each.VAR_KEYWORD for each in parameters.values()):
        given = {name: value for name, value in given.items() if name in parameters}
    if not strange:
        return reward(**given)
    return reward(prompts, completions, **{name: given[name] for name in columns if name in given})


def _positional(parameter: inspect.Parameter) -> bool:
    """Whether a value by position must, or may, fill it."""
    kinds = (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    return (parameter.kind in kinds and parameter.default is parameter.empty) or (
        parameter.kind == parameter.VAR_POSITIONAL
    )


def _asked(
    reward: Reward,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    asking: Asking,
    first: int,
) -> Sequence[Any]:
    """The items of one call, after as many tries as are allowed."""
    for attempt in range(asking.retries + 1):
        try:
            items = wait_for(lambda: call_reward(reward, prompts, completions, columns), asking.timeout)
        except Exception as error:
            if attempt < asking.retries:
                time.sleep(asking.retry_delay * 2**attempt)
                continue
            if asking.on_error == "drop":
                break
            last = first + len(prompts) - 1
            error.add_note(f"reward: rows {first} to {last} (counted from 0), {attempt + 1} tries.")
            raise
        return _one_each(items, len(prompts), first)
    return [None] * len(prompts)


def _one_each(items: Any, rows: int, first: int) -> Sequence[Any]:
    if isinstance(items, Tensor | np.ndarray):
        items = list(items)
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise ShapeError(f"reward: expected a list with one item per row, got {type(items).__name__}.")
    if len(items) != rows:
        raise ShapeError(
            f"reward: expected {rows} items, one for each of rows {first} to {first + rows - 1}, got "
            f"{len(items)}. Return None for a row without a reward."
        )
    return items


def value_of(item: Any, length: int, row: int) -> RewardOut | None:
    """One item as a `RewardOut`, its numbers checked but for being finite.

    Args:
        item: what the function returned.
        length: L, tokens of the completion.
        row: for messages, counted from 0.

    Raises:
        ShapeError: token rewards that are not [L].
        DataError: an item of another kind.
    """
    if item is None:
        return None
    if isinstance(item, Tensor | np.ndarray) and item.ndim == 1:
        return RewardOut(token_rewards=_tokens(item, length, row))
    if not isinstance(item, RewardOut):
        return RewardOut(_number(item, row))
    if item.score is None and item.token_rewards is None:
        return None
    score = None if item.score is None else _number(item.score, row)
    tokens = None if item.token_rewards is None else _tokens(item.token_rewards, length, row)
    return RewardOut(score, tokens, item.info)


def _number(item: Any, row: int) -> float:
    """A score; a string is none, not even one that holds digits."""
    try:
        if isinstance(item, str | bytes):
            raise TypeError
        return float(item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"expected a number, a vector of token rewards, a RewardOut or None, got {type(item).__name__}.",
            code="bad_reward",
            file="<reward>",
            row=row,
            excerpt=repr(item),
        ) from error


def _tokens(rewards: Any, length: int, row: int) -> Tensor:
    rewards = torch.as_tensor(rewards)
    if rewards.shape != (length,):
        raise ShapeError(
            f"reward: expected {length} token rewards in row {row} (counted from 0), one per completion "
            f"token, got {tuple(rewards.shape)}."
        )
    return cast(Tensor, rewards.detach().to("cpu", torch.float32))


def _check_finite(values: Sequence[RewardOut | None]) -> None:
    bad = [row for row, value in enumerate(values) if value is not None and not _finite(value)]
    if bad:
        shown = cast(RewardOut, values[bad[0]])
        raise NonFiniteError(
            f"reward: expected finite rewards, got NaN or infinity in {_named(bad)} (counted from 0), first "
            f"{shown.score if shown.token_rewards is None else shown.token_rewards}. Return None for a row "
            "without a reward."
        )


def _finite(value: RewardOut) -> bool:
    tokens_finite = value.token_rewards is None or bool(value.token_rewards.isfinite().all())
    return tokens_finite and (value.score is None or math.isfinite(value.score))


def _named(rows: Sequence[int]) -> str:
    some = ", ".join(map(str, rows[:8]))
    return f"rows {some}{', ...' if len(rows) > 8 else ''}"
