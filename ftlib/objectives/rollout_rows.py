"""Rollouts as rows of the loss: padded for the recursions over time, ragged for the batch.

Shapes: B rollouts, L positions of a padded row, N scored rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ftlib.batches import Mean, PackedBatch, Rollout
from ftlib.errors import ConfigError, ShapeError
from ftlib.losses import kl_estimate

__all__ = [
    "PTX",
    "Example",
    "Rows",
    "examples",
    "is_ptx",
    "of_one_prompt",
    "ptx_row",
    "rollout_metrics",
    "to_row",
]

Example = dict[str, Any]  # an encoded row, as `collate` takes it
PTX = "ptx"  # the extra that marks rows of pre-training text
NUMBERS = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns", "importance")  # per token


def examples(rows: Sequence[Example], *, max_tokens: int | None = None) -> list[Example]:
    """Rows as groups: those of one prompt that stand next to each other share its computation.

    Args:
        rows: as `to_row` makes them.
        max_tokens: most tokens of a group of several rows; None for no bound.
    """
    groups = []
    prompts = [row["prefix_ids"] for row in rows]
    own = [len(row["continuation_ids"][0]) for row in rows]
    for members in of_one_prompt(prompts, own, math.inf if max_tokens is None else max_tokens):
        joined = [rows[index] for index in members]
        first = joined[0]
        parts = {
            name: [part for member in joined for part in member[name]]
            for name, value in first.items()
            if name != "prefix_ids" and isinstance(value, list)
        }
        length = len(first["prefix_ids"]) + sum(map(len, parts["continuation_ids"]))
        groups.append({**first, **parts, "length": length})
    return groups


def of_one_prompt(
    prompts: Sequence[Sequence[int]], lengths: Sequence[int], max_tokens: float
) -> Iterator[list[int]]:
    """Indices of rows next to each other that have one prompt, in groups of at most so many tokens.

    Args:
        prompts: token ids of each row.
        lengths: tokens of each row behind its prompt.
        max_tokens: of a group of several rows, its prompt counted once.
    """
    for _, members in groupby(range(len(prompts)), key=prompts.__getitem__):
        joined: list[int] = []
        size = 0
        for index in members:
            if joined and size + lengths[index] > max_tokens:
                yield joined
                joined = []
            size = (size if joined else len(prompts[index])) + lengths[index]
            joined.append(index)
        yield joined


@final
@dataclass(frozen=True, eq=False)
class Rows:
    """Rollouts as padded rows [B, L], right-padded; what lies under mask False is zero."""

    mask_BL: Tensor
    old_BL: Tensor
    ref_BL: Tensor
    sampler_BL: Tensor  # where it was warped; `old_BL` elsewhere
    values_BL: Tensor
    token_rewards_BL: Tensor

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], beta: float) -> Rows:
        """Of rollouts that carry what a penalty of `beta` needs."""
        if not rollouts:
            raise ShapeError("PPO.prepare: expected at least one rollout, got none.")
        lacking = [i for i, rollout in enumerate(rollouts) if rollout.old_logprobs is None]
        if lacking:
            raise ShapeError(
                f"PPO.prepare: expected old_logprobs in every rollout, got none in {lacking[:5]}. "
                "PPOTrainer.update computes them."
            )
        if beta and any(rollout.ref_logprobs is None for rollout in rollouts):
            raise ConfigError(
                f"PPO.prepare: expected ref_logprobs for a KL penalty of {beta}, got rollouts without. Give "
                "a reference, or set kl_coef=0."
            )
        columns = {
            "old_BL": [rollout.old_logprobs for rollout in rollouts],
            "ref_BL": [
                rollout.old_logprobs if rollout.ref_logprobs is None else rollout.ref_logprobs
                for rollout in rollouts
            ],
            "sampler_BL": [
                rollout.sampler_logprobs if rollout.sampling.warped else rollout.old_logprobs
                for rollout in rollouts
            ],
            "values_BL": [rollout.values for rollout in rollouts],
            "token_rewards_BL": [rollout.token_rewards for rollout in rollouts],
        }
        padded = {
            name: _padded(
                [_clean(vector, rollout) for vector, rollout in zip(vectors, rollouts, strict=True)]
            )
            for name, vectors in columns.items()
        }
        return cls(mask_BL=_padded([rollout.mask for rollout in rollouts]), **padded)


def _clean(vector: Tensor | None, rollout: Rollout) -> Tensor:
    """The vector with zeros where the policy did not sample, or all zeros."""
    zeros = torch.zeros(len(rollout.completion_ids))
    return zeros if vector is None else torch.where(rollout.mask, vector.float(), zeros)


def _padded(vectors: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(vectors), batch_first=True)


def to_row(rollout: Rollout, mask_L: Tensor, numbers: Mapping[str, Tensor], beta: float) -> Example:
    """One rollout as an encoded row; its loss weights are 1 where `mask_L` is True."""
    n = len(rollout.completion_ids)
    return {
        "prefix_ids": rollout.prompt_ids.tolist(),
        "prefix_weights": torch.zeros(len(rollout.prompt_ids)),
        "continuation_ids": [rollout.completion_ids],
        "continuation_weights": [mask_L[:n].float()],
        "length": len(rollout),
        "source": str(rollout.info.get("source", "<rollouts>")),
        "beta": [beta],
        PTX: [0.0],
        **{name: [vector_L[:n]] for name, vector_L in numbers.items()},
    }


def ptx_row(row: Mapping[str, Any]) -> Example:
    """An encoded example of pre-training text, with the columns of rollouts."""
    zeros = [torch.zeros(len(ids)) for ids in row["continuation_ids"]]
    return {**row, "beta": [0.0] * len(zeros), PTX: [1.0] * len(zeros), **dict.fromkeys(NUMBERS, zeros)}


def is_ptx(batch: PackedBatch) -> Tensor:
    """Which scored rows are of pre-training text, bool [N]."""
    if PTX not in batch.extras:
        return torch.zeros_like(batch.weights_N, dtype=torch.bool)
    return batch.extras[PTX][batch.owner_N] > 0


def rollout_metrics(
    rows: Rows,
    mask_BL: Tensor,
    scores_B: Tensor,
    finished_B: Tensor,
    *,
    rewards_BL: Tensor,
    advantages_BL: Tensor,
    returns_BL: Tensor,
) -> dict[str, Mean]:
    """Of the rollouts: scores and KL per sequence; advantages, values and returns per token of `mask_BL`.

    In float64: a variance is what a mean of squares leaves over a square of the mean.
    """
    scores_B, rewards_BL, advantages_BL, returns_BL, values_BL = (
        x.double() for x in (scores_B, rewards_BL, advantages_BL, returns_BL, rows.values_BL)
    )
    rollouts = torch.tensor(float(len(scores_B)))
    tokens = mask_BL.float().sum()
    k3_BL = kl_estimate(rows.old_BL, rows.ref_BL, kind="k3", mask=rows.mask_BL)
    per_row = {
        "score": scores_B,
        "score_squared": scores_B.square(),
        "shaped_reward": rewards_BL.sum(1),
        "kl": ((rows.old_BL - rows.ref_BL) * rows.mask_BL).sum(1),
        "kl_k3": k3_BL.sum(1),
        "finished": finished_B.float(),
        "completion_tokens": rows.mask_BL.float().sum(1),
    }
    errors_BL = returns_BL - values_BL
    per_token = {
        "advantage": advantages_BL,
        "advantage_squared": advantages_BL.square(),
        "value": values_BL,
        "return": returns_BL,
        "return_squared": returns_BL.square(),
        "error": errors_BL,
        "error_squared": errors_BL.square(),
    }
    return {
        **{name: Mean(values.sum(), rollouts) for name, values in per_row.items()},
        **{name: Mean((values * mask_BL).sum(), tokens) for name, values in per_token.items()},
    }
