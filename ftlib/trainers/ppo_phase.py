"""One rollout phase over all ranks: each completes and values its share of the prompts, all get every row.

A reward is asked for once per row, wherever it is asked. Completions do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ftlib.batches import Mean, Sampling
from ftlib.engine.engine import Engine
from ftlib.errors import DataError, FtlibError
from ftlib.rollouts import Collected, Prompt, Sampler, collect
from ftlib.rollouts.rewards import Asking, Reward

__all__ = ["collect_on_ranks"]


def collect_on_ranks(
    engine: Engine,
    sampler: Sampler,
    rows: Sequence[Mapping[str, Any]],
    reward: Reward,
    sampling: Sampling,
    *,
    decode: Callable[[Sequence[int]], str] | None,
    seed: int,
    iteration: int,
    asking: Asking,
) -> Collected:
    """`collect`, the prompts dealt to the ranks. Every rank takes part, with equal arguments.

    Args:
        engine: knows the ranks.
        sampler: of this rank, in step with the policy.
        rows: of all ranks: token ids as "prefix_ids", and if it is there the "prompt" as it came and the
            other "columns" of its row.
        reward: see `collect`.
        sampling: see `collect`.
        decode: see `collect`.
        seed: see `collect`.
        iteration: see `collect`.
        asking: what to do about rewards that fail; its `max_drop_frac` is a share of the rows of all ranks.

    Returns:
        The rows and metrics of all ranks, in the order of their prompts.

    Raises:
        DataError: too many rows without a reward.
        Exception: what sampler and reward raise; on the other ranks an `FtlibError` that tells of it.
    """
    world, rank = engine.accelerator.num_processes, engine.accelerator.process_index

    def share(places: Sequence[int]) -> Collected:
        return collect(
            sampler,
            [
                Prompt(row["prefix_ids"], row.get("prompt"), row.get("columns", {}))
                for row in _of(rows, places)
            ],
            reward,
            sampling,
            decode=decode,
            seed=seed,
            iteration=iteration,
            places=places,
            asking=asking if world == 1 else replace(asking, max_drop_frac=1.0),
        )

    if world == 1:
        return share(range(len(rows)))
    own, failure = Collected([], {}), None
    places = np.array_split(np.arange(len(rows)), world)[rank].tolist()
    try:
        if places:
            own = share(places)
    except Exception as error:  # noqa: BLE001  raised below, once the others know
        failure = error
    told = engine.from_every_rank(
        None if failure is None else repr(failure)
    )  # nobody waits for one that failed
    if failure is not None:
        raise failure
    if any(told):
        raise FtlibError(
            f"rollout: expected completions from every rank, got errors: {[t for t in told if t]}."
        )
    whole = _joined(engine.from_every_rank(own))
    _check_dropped(whole.metrics["dropped"], asking.max_drop_frac)
    return whole


def _of(rows: Sequence[Mapping[str, Any]], places: Sequence[int]) -> list[Mapping[str, Any]]:
    return [rows[place] for place in places]


def _joined(parts: Sequence[Collected]) -> Collected:
    metrics: dict[str, Mean] = {}
    for part in parts:
        for name, mean in part.metrics.items():
            metrics[name] = metrics[name] + mean if name in metrics else mean
    return Collected([rollout for part in parts for rollout in part.rollouts], metrics)


def _check_dropped(dropped: Mean, most: float) -> None:
    if float(dropped.sum) > most * float(dropped.count):
        raise DataError(
            f"expected a reward for all but {most:.0%} of the rows, got none for {int(dropped.sum)} of "
            f"{int(dropped.count)} on all ranks. Look at what the reward makes of them, or "
            "raise max_drop_frac.",
            code="rewards_missing",
            file="<reward>",
        )
