"""One rollout phase over all ranks: each completes and values its share of the prompts, all get every row.

A reward is asked for once per row, wherever it is asked. Completions do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np

from ftlib.batches import Mean, Sampling
from ftlib.engine.engine import Engine
from ftlib.errors import DataError, FtlibError
from ftlib.rollouts import Collected, Prompt, Sampler, collect
from ftlib.rollouts.rewards import Asking, Reward

__all__ = ["Collector"]


@final
@dataclass(frozen=True, eq=False)
class Collector:
    """`collect`, the prompts dealt to the ranks. Every rank takes part, with equal arguments.

    Args:
        engine: of the policy; knows the ranks.
        sampler: of this rank.
        reward: see `collect`.
        sampling: see `collect`.
        decode: see `collect`.
        seed: see `collect`.
        asking: what to do about rewards that fail; its `max_drop_frac` is a share of the rows of all ranks.
    """

    engine: Engine
    sampler: Sampler
    reward: Reward
    sampling: Sampling
    decode: Callable[[Sequence[int]], str] | None
    seed: int
    asking: Asking

    def __call__(self, rows: Sequence[Mapping[str, Any]], *, iteration: int, version: int) -> Collected:
        """Completions of the policy as it is now, valued.

        Args:
            rows: of all ranks: token ids as "prefix_ids", and if it is there the "prompt" as it came and the
                other "columns" of its row.
            iteration: see `collect`.
            version: of the policy's weights.

        Returns:
            The rows and metrics of all ranks, in the order of their prompts.

        Raises:
            DataError: too many rows without a reward.
            Exception: what sampler and reward raise; on the other ranks an `FtlibError` that tells of it.
        """
        self.sampler.sync(self.engine.model, version)
        world, rank = self.engine.accelerator.num_processes, self.engine.accelerator.process_index
        if world == 1:
            return self._share(rows, range(len(rows)), iteration, self.asking)
        own, failure = Collected([], {}), None
        places = np.array_split(np.arange(len(rows)), world)[rank].tolist()
        try:
            if places:
                own = self._share(rows, places, iteration, replace(self.asking, max_drop_frac=1.0))
        except Exception as error:  # noqa: BLE001  raised below, once the others know
            failure = error
        # nobody waits for one that failed
        told = self.engine.from_every_rank(None if failure is None else repr(failure))
        if failure is not None:
            raise failure
        if any(told):
            raise FtlibError(
                f"rollout: expected completions from every rank, got errors: {[t for t in told if t]}."
            )
        whole = _joined(self.engine.from_every_rank(own))
        _check_dropped(whole.metrics["dropped"], self.asking.max_drop_frac)
        return whole

    def _share(
        self, rows: Sequence[Mapping[str, Any]], places: Sequence[int], iteration: int, asking: Asking
    ) -> Collected:
        """The rows of some places."""
        chosen = [rows[place] for place in places]
        return collect(
            self.sampler,
            [Prompt(row["prefix_ids"], row.get("prompt"), row.get("columns", {})) for row in chosen],
            self.reward,
            self.sampling,
            decode=self.decode,
            seed=self.seed,
            iteration=iteration,
            places=places,
            asking=asking,
        )


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
