"""What the policy said in an update, and what that was worth: a table of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ftlib.batches import Rollout
from ftlib.trainers.ppo_given import reward_of

__all__ = ["sample_table"]


def sample_table(
    rollouts: Sequence[Rollout], decode: Callable[[Sequence[int]], str] | None
) -> list[dict[str, Any]]:
    """One row per rollout, ready for a data frame.

    Args:
        rollouts: with the log-probabilities of policy and reference.
        decode: token ids to text; None shows the ids.

    Returns:
        Rows of "prompt", "completion", "reward" as it was given, "kl" in nats (k1) where there is a
        reference, "finished", and whatever else the reward told.
    """
    return [_row(rollout, decode or list) for rollout in rollouts]


def _row(rollout: Rollout, shown: Callable[[Sequence[int]], Any]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "prompt": shown(rollout.prompt_ids.tolist()),
        "completion": shown(rollout.completion_ids.tolist()),
        "reward": reward_of(rollout),
        "finished": rollout.finished,
    }
    if rollout.old_logprobs is not None and rollout.ref_logprobs is not None:
        log_ratio_L = rollout.old_logprobs - rollout.ref_logprobs
        row["kl"] = float(log_ratio_L[rollout.mask].sum())
    return row | {name: value for name, value in rollout.info.items() if name not in row}
