"""The settings of a PPO run: those of any run, and those of rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import Literal, final

from ftlib.checks import COUNT, NATURAL, SWITCH, TEXT, Wanted, listed, number, one_of
from ftlib.engine.config import TrainConfig, suggests_names
from ftlib.errors import ConfigError
from ftlib.objectives.ppo_options import WANTED, KLPlace, Truncation

__all__ = ["PPOConfig"]

OnRewardError = Literal["raise", "drop"]

_WANTED: Mapping[str, Wanted] = {
    **WANTED,
    **dict.fromkeys(("samples_per_prompt", "epochs_per_rollout", "minibatches", "max_new_tokens"), COUNT),
    **dict.fromkeys(("critic_warmup", "reward_retries", "top_k"), NATURAL),
    "reward_batch_size": COUNT.or_none,
    "eval_batch_size": Wanted("None; evaluation prompts are sampled", lambda value: value is None),
    "kl_horizon": number(above=0),
    "top_p": number(above=0, most=1),
    "stop": listed("token ids and strings", lambda end: type(end) in (str, int)).or_none,
    "kl_coef": number(0),
    "value_learning_rate": number(0).or_none,
    **dict.fromkeys(("kl_target", "reward_timeout"), number(above=0, most=inf).or_none),
    "max_drop_frac": number(0, most=1),
    "scale_scores": SWITCH,
    "reward_on_error": one_of(OnRewardError),
    "stop_on": listed("names of warnings", TEXT.holds),
}


@final
@suggests_names
@dataclass(frozen=True)
class PPOConfig(TrainConfig):
    """Settings of `PPOTrainer`. See `TrainConfig` for the others; here `max_steps`, `log_steps`, `eval_steps`
    and `save_steps` count rollouts with their updates, and `batch_size` counts rows, prompts times samples.

    Args:
        eps: of Adam; with 1e-8 the first updates move the policy about six times as far.
        samples_per_prompt: completions of each prompt, >= 1; divides `batch_size`.
        epochs_per_rollout: passes over the rows of a rollout, >= 1.
        minibatches: optimiser steps of one pass, each on `batch_size` rows, >= 1.
        max_new_tokens: of a completion, >= 1.
        temperature: of sampling, > 0; the losses see the same distribution.
        top_p: the nucleus sampled from, in (0, 1]; below 1 rows are weighted for it.
        top_k: tokens sampled from; 0 is all.
        stop: ids or strings that end a completion; None takes the tokenizer's and the model's EOS.
        kl_coef: strength of the KL penalty, score units per nat, >= 0.
        kl_target: KL to settle at, nats per sequence; None keeps `kl_coef` fixed.
        kl_horizon: of the adaptation, sequences.
        kl_place: "reward" or "loss".
        kl_kind: estimator there; None takes the one that fits.
        gamma: discount per token.
        lam: decay of advantages.
        lam_value: the critic's own decay; None is `lam`.
        clip: of the ratio, one number or (low, high).
        dual: bound on the loss of bad tokens; None for none.
        value_clip: of the values; None for none.
        value_coef: weight of the value loss.
        value_learning_rate: of the critic's weights; None is five times `learning_rate`, or five times LoRA's
            where that is a rate of virtual tokens.
        critic_warmup: first rollouts that train the critic alone, >= 0.
        whiten_advantages: over all rows of a rollout.
        whiten_rewards: likewise, keeping the mean.
        score_clip: scores are kept within this of zero; None for no bound.
        scale_scores: divide scores by their running standard deviation.
        missing_stop_penalty: taken off the score of a row that does not end.
        missing_stop_score: replaces it; None keeps it.
        truncation: "terminal", "bootstrap" or "mask", for rows that do not end.
        entropy_coef: weight of the entropy bonus.
        ptx_coef: weight of the likelihood of `ptx_dataset` in every step.
        max_drop_frac: most rows without a reward, as a share, before it is an error.
        reward_retries: further tries of a call of the reward that raises, each after twice the pause, >= 0.
        reward_timeout: seconds for one call, > 0; None waits for ever.
        reward_on_error: when all tries have failed, "raise", or "drop" the rows of that call.
        reward_batch_size: rows of one call, >= 1; None asks for all at once.
        stop_on: warnings of health that stop the run, by name; see `PPOTrainer`.

    Raises:
        ConfigError: as for `TrainConfig`.
    """

    eps: float = 1e-5
    samples_per_prompt: int = 1
    epochs_per_rollout: int = 4
    minibatches: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: Sequence[int | str] | None = None
    kl_coef: float = 0.05
    kl_target: float | None = None
    kl_horizon: float = 10_000.0
    kl_place: KLPlace = "reward"
    kl_kind: str | None = None
    gamma: float = 1.0
    lam: float = 0.95
    lam_value: float | None = None
    clip: float | tuple[float, float] = 0.2
    dual: float | None = None
    value_clip: float | None = 0.2
    value_coef: float = 0.1
    value_learning_rate: float | None = None
    critic_warmup: int = 5
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    score_clip: float | None = None
    scale_scores: bool = False
    missing_stop_penalty: float = 1.0
    missing_stop_score: float | None = None
    truncation: Truncation = "terminal"
    entropy_coef: float = 0.0
    ptx_coef: float = 0.0
    max_drop_frac: float = 0.1
    reward_retries: int = 0
    reward_timeout: float | None = None
    reward_on_error: OnRewardError = "raise"
    reward_batch_size: int | None = None
    stop_on: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(_WANTED)
        if self.batch_size % self.samples_per_prompt:
            raise ConfigError(
                f"PPOConfig: expected batch_size to be a multiple of samples_per_prompt="
                f"{self.samples_per_prompt}, got {self.batch_size}. It counts rows."
            )
        if self.kl_target is None and self.kl_horizon != _default("kl_horizon"):
            raise ConfigError("PPOConfig: kl_horizon has no effect without kl_target. Set both.")

    @property
    def rows(self) -> int:
        """Rows of one rollout phase, over all ranks."""
        return self.batch_size * self.minibatches

    @property
    def prompts(self) -> int:
        """Prompts of one rollout phase, over all ranks."""
        return self.rows // self.samples_per_prompt


def _default(name: str) -> object:
    return next(field.default for field in fields(PPOConfig) if field.name == name)
