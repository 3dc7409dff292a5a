"""Warnings of an unhealthy PPO run: what is seen, what it means, what to do. Each is told once.

| name | seen |
|---|---|
| kl_negative | KL per sequence below -1 |
| kl_high | KL per sequence above five times its target |
| first_ratio | the first minibatch is not at ratio 1: mean deviation above 0.05 |
| clip_fraction | more than 0.3 of the tokens clipped |
| explained_variance | below 0 after the critic's warm-up |
| unfinished | fewer than half of the completions end |
| length_drift | completions twice as long, or half, as at the start |
| sampler | the sampler's log-probabilities are off by more than a tenth: mean ratio above 1.1 |
| flat_score | all scores of a rollout are equal |
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from ftlib.batches import Mean, Rollout
from ftlib.engine.ppo_config import PPOConfig
from ftlib.errors import ConfigError
from ftlib.rollouts import sampler_agreement

__all__ = ["CHECKS", "Health", "agreement_of"]

logger = logging.getLogger(__name__)

CHECKS = {
    "kl_negative": "the KL estimate is below -1 nat per sequence: log-probabilities of sampler and trainer "
    "differ, or the temperature does. Look at first_ratio_deviation.",
    "kl_high": "the policy is five times further from the reference than asked for. Raise kl_coef, or lower "
    "learning_rate.",
    "first_ratio": "the first minibatch is not at ratio 1: the rollouts are not of this policy.",
    "clip_fraction": "more than 30 % of the tokens are clipped. Lower learning_rate or epochs_per_rollout.",
    "explained_variance": "the critic explains less than a constant would. Lengthen critic_warmup, or raise "
    "value_learning_rate.",
    "unfinished": "fewer than half of the completions end. Raise max_new_tokens, or check stop.",
    "length_drift": "completions have doubled or halved in length since the start. Look at samples: the "
    "reward may pay for length.",
    "sampler": "the sampler does not draw from the policy: its log-probabilities differ from the trainer's "
    "by more than a tenth. Check that it follows the weights, and its temperature and dtype.",
    "flat_score": "all scores of a rollout are equal: nothing can be learned from it. Check the reward.",
}


def agreement_of(rollouts: Sequence[Rollout]) -> dict[str, Mean]:
    """`sampler_agreement` of the rows it can be told of: not those drawn with top-p or top-k."""
    told = [row for row in rollouts if row.sampler_logprobs is not None and not row.sampling.warped]
    return sampler_agreement(told) if told else {}


@final
@dataclass
class Health:
    """Looks at every row of a run.

    Args:
        config: of the run; `stop_on` names the warnings that stop it.

    Raises:
        ConfigError: `stop_on` names one that does not exist.
    """

    config: PPOConfig
    _told: set[str] = field(default_factory=set)
    _first_length: float | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.config.stop_on) - set(CHECKS))
        if unknown:
            raise ConfigError(f"PPOConfig: expected stop_on names of {sorted(CHECKS)}, got {unknown}.")

    def state_dict(self) -> dict[str, Any]:
        """What was told, and the length at the start."""
        return {"told": sorted(self._told), "first_length": self._first_length}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Go on from such a state."""
        self._told, self._first_length = set(state["told"]), state["first_length"]

    def look(self, row: Mapping[str, float]) -> None:
        """Warn of what is seen for the first time.

        Raises:
            ConfigError: one of `stop_on`.
        """
        for name in self._seen(row):
            message = f"step {row['step']:.0f}: {CHECKS[name]}"
            if name in self.config.stop_on:
                raise ConfigError(f"PPOTrainer: stopped: {message}")
            if name not in self._told:
                logger.warning("%s (told once; PPOConfig.stop_on=[%r] would stop here)", message, name)
                self._told.add(name)

    def _seen(self, row: Mapping[str, float]) -> list[str]:
        target, length = self.config.kl_target, row["completion_tokens"]
        first = self._first_length = self._first_length or length
        warmed_up = row["step"] > self.config.critic_warmup
        seen = {
            "kl_negative": row["kl"] < -1,
            "kl_high": target is not None and row["kl"] > 5 * target,
            "first_ratio": row["first_ratio_deviation"] > 0.05,
            "clip_fraction": row["clip_fraction"] > 0.3,
            "explained_variance": warmed_up and row.get("explained_variance", 0.0) < 0,
            "unfinished": row["finished"] < 0.5,
            "length_drift": not first / 2 <= length <= first * 2,
            "sampler": row.get("sampler_ratio", 1.0) > 1.1,
            "flat_score": row.get("score_std", 1.0) == 0,
        }
        return [name for name, bad in seen.items() if bad]
