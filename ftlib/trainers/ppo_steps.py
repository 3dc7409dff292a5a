"""The optimiser steps of one update: which rows each takes, and whom it moves.

| critic | a minibatch is |
|---|---|
| on the policy's trunk | one step of both; while the critic warms up, of its head alone |
| with a model of its own | a step of each; while the critic warms up, of the critic alone |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from torch import nn

from ftlib.batches import Mean, Rollout
from ftlib.engine.determinism import modes
from ftlib.engine.engine import Engine
from ftlib.engine.ppo_config import PPOConfig
from ftlib.errors import ShapeError
from ftlib.models.modes import no_dropout
from ftlib.models.references import Reference
from ftlib.objectives import PPO
from ftlib.objectives.rollout_rows import Example, examples, ptx_row
from ftlib.objectives.rollout_scoring import read_rollouts
from ftlib.trainers.ppo_critic import OwnCritic
from ftlib.trainers.ppo_phase import Moved

__all__ = ["Learners", "minibatches", "ptx_rows"]


def minibatches(rows: Sequence[Example], config: PPOConfig, iteration: int) -> Iterator[list[Example]]:
    """Of every epoch, the rows of each minibatch: an order from (seed, iteration, epoch) alone.

    Rows of which no token counts are left out; fewer rows than minibatches make one each.

    Args:
        rows: of one update.
        config: epochs, minibatches and seed.
        iteration: updates made before.
    """
    counted = [i for i, row in enumerate(rows) if bool(row["continuation_weights"][0].any())]
    places = np.array(counted or range(len(rows)))
    for epoch in range(config.epochs_per_rollout):
        order = np.random.default_rng((config.seed, iteration, epoch)).permutation(places)
        for part in np.array_split(order, min(config.minibatches, len(order))):
            yield [rows[index] for index in sorted(part.tolist())]  # of one prompt next to each other


def ptx_rows(data: Any, count: int, draw: tuple[int, ...]) -> list[Example]:
    """Rows of pre-training text, drawn by `draw` alone; none where there is no data."""
    if data is None:
        return []
    indices = np.random.default_rng(draw).integers(len(data), size=count)
    return [ptx_row(data[index]) for index in indices.tolist()]


@final
@dataclass(frozen=True, eq=False)
class Learners:
    """Policy and critic, which the same minibatches move.

    Args:
        engine: of the policy.
        critic: one with a model of its own; None for none.
        objective: of the policy.
    """

    engine: Engine
    critic: OwnCritic | None
    objective: PPO

    @property
    def models(self) -> list[nn.Module]:
        """Those that are trained."""
        return [self.engine.model] if self.critic is None else [self.engine.model, self.critic.engine.model]

    @property
    def valued_by(self) -> nn.Module | None:
        """What gives values: the critic's own model or the policy's; None without a critic."""
        if self.critic is not None:
            own: nn.Module = self.critic.engine.scorer
            return own
        return self.engine.scorer if self.objective.critic else None

    @torch.no_grad()
    def read(self, rollouts: Sequence[Rollout], reference: Reference | None) -> tuple[list[Rollout], Mean]:
        """Rollouts with the numbers that stay fixed in their update, and the entropy; see `read_rollouts`."""
        if not rollouts:
            raise ShapeError("PPOTrainer.update: expected at least one rollout, got none.")
        self.engine.scorer.train()
        return read_rollouts(
            rollouts,
            self.engine.scorer,
            critic=self.valued_by,
            reference=reference,
            temperature=self.objective.temperature,
            max_tokens=self.engine.max_tokens,
            device=self.engine.device,
        )

    def step(self, rows: Sequence[Example], text: Sequence[Example], *, warming: bool) -> Moved:
        """One minibatch.

        Args:
            rows: of rollouts.
            text: of pre-training, which joins a step of the policy.
            warming: the critic learns alone; without a critic nobody warms up.
        """
        minibatch = examples(rows, max_tokens=self.engine.max_tokens)
        warming = warming and self.valued_by is not None
        policy = critic = None
        with no_dropout(self.engine.model):
            if not warming:
                policy = self.engine.step([*minibatch, *text])
            elif self.critic is None:
                with self._head_alone():
                    policy = self.engine.step(minibatch)
        if self.critic is not None:
            with no_dropout(self.critic.engine.model):
                critic = self.critic.engine.step(minibatch)
        return Moved(policy, critic)

    @contextmanager
    def _head_alone(self) -> Iterator[None]:
        """The policy's engine moves the value head, and nothing under it."""
        self.engine.objective = replace(
            self.objective, policy=False, trunk=False, entropy_coef=0.0, ptx_coef=0.0
        )
        try:
            yield
        finally:
            self.engine.objective = self.objective

    @contextmanager
    def modes_kept(self) -> Iterator[None]:
        """Every module of both gets its mode back, after an exception too."""
        with ExitStack() as scope:
            for model in self.models:
                scope.enter_context(modes(model))
            yield
