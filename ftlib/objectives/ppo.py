"""Proximal policy optimisation: rollouts to advantages once, then a clipped loss per sampled token.

    prepare     scores and KL become rewards, these advantages and returns; no gradient
    objective   L = sum(policy) / N + c_v sum(value) / N + c_kl sum(KL) / N - c_e sum(entropy) / N
                    + c_ptx sum(nll) / M,   N sampled tokens, M pre-training tokens of the whole step

Left out on purpose: a reward for every token of the same score, and a stop token put after a row that was
cut; both move the optimum.

Shapes: B rollouts, L positions of a padded row, N scored rows, C continuations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from ftlib.batches import LossOutput, Mean, PackedBatch, Rollout
from ftlib.checks import check
from ftlib.errors import ConfigError, ShapeError
from ftlib.losses import gae, kl_estimate, nll, ppo_policy, ppo_value, shape_rewards, whiten
from ftlib.losses.kl import check_kl_placement
from ftlib.losses.policy import policy_ratio
from ftlib.models import Scored, forward
from ftlib.objectives.ppo_options import WANTED, KLPlace, Truncation
from ftlib.objectives.rollout_rows import Example, Rows, is_ptx, rollout_metrics, to_row

__all__ = ["PPO", "Prepared", "Truncation"]

MAX_IMPORTANCE = 2.0


@final
@dataclass(frozen=True, eq=False)
class Prepared:
    """Rollouts ready for the loss.

    Args:
        rows: one `Example` per rollout, in order; `examples` joins those that share a prompt.
        metrics: name -> `Mean` over rollouts or their sampled tokens.
    """

    rows: list[Example]
    metrics: Mapping[str, Mean]


@final
@dataclass(frozen=True)
class PPO:
    """The loss of one minibatch of rollouts, and what turns rollouts into minibatches.

    Args:
        clip: how far the ratio pays, one number or (low, high).
        dual: bound on the loss of bad tokens, > 1; None for none.
        value_clip: how far a value pays to move; None for no clip.
        value_coef: weight of the value loss, >= 0.
        entropy_coef: weight of the entropy bonus, >= 0.
        ptx_coef: weight of the token-mean NLL of pre-training rows in the step, >= 0.
        temperature: of the sampling; the loss sees the same distribution.
        critic: whether the model's own value head is trained here.
        policy: False leaves the policy's terms out.
        trunk: whether the value loss reaches the model under the value head.
        gamma: discount per sampled token.
        lam: decay of advantages.
        lam_value: the critic's own decay; None is `lam`.
        whiten_advantages: to mean 0 and variance 1 over all sampled tokens of the rollouts.
        whiten_rewards: to variance 1, keeping their mean.
        missing_stop_penalty: taken off the score of a row that did not end by itself, >= 0.
        missing_stop_score: replaces the score of such a row; None keeps it.
        score_clip: scores are kept within this of zero; None for no bound.
        truncation: of such rows: "terminal" counts nothing after the cut, "bootstrap" the value there,
            "mask" leaves the row out of the loss.
        kl_place: the KL penalty is a reward ("reward") or a term of the loss ("loss").
        kl_kind: its estimator; None is "k1" in the reward and "k3_plus" in the loss.

    Raises:
        ConfigError: a value out of range, or an estimator that does not regularise where it is put.

    Source: Schulman et al. 2017 (arXiv:1707.06347), eq. 9; on language models Ziegler et al. 2019
    (arXiv:1909.08593), section 2.2, and Ouyang et al. 2022 (arXiv:2203.02155), eq. 2.
    """

    clip: float | tuple[float, float] = 0.2
    dual: float | None = None
    value_clip: float | None = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    ptx_coef: float = 0.0
    temperature: float = 1.0
    critic: bool = True
    policy: bool = True
    trunk: bool = True
    gamma: float = 1.0
    lam: float = 0.95
    lam_value: float | None = None
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    missing_stop_penalty: float = 1.0
    missing_stop_score: float | None = None
    score_clip: float | None = None
    truncation: Truncation = "terminal"
    kl_place: KLPlace = "reward"
    kl_kind: str | None = None

    def __post_init__(self) -> None:
        check("objectives.PPO", {name: (getattr(self, name), must) for name, must in WANTED.items()})
        if self.ptx_coef and self.temperature != 1.0:
            raise ConfigError(
                f"PPO: expected temperature=1.0 with ptx_coef, got {self.temperature}: text would be learned "
                "at the temperature of the sampling."
            )
        check_kl_placement(self._kl_kind, self.kl_place)
        if self._kl_kind == "exact":
            raise ConfigError(
                "KL 'exact' in the loss: it takes whole distributions, and this loss sees the sampled tokens "
                "alone. Use 'k3_plus' or 'k2'."
            )
        # one token shows whether the ranges of the losses hold
        token_11, mask_11 = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
        ppo_policy(token_11, token_11, token_11, mask_11, clip=self.clip, dual=self.dual)
        ppo_value(token_11, token_11, token_11, mask_11, clip=self.value_clip)
        gae(token_11, token_11, mask_11, gamma=self.gamma, lam=self.lam, lam_value=self.lam_value)

    @property
    def _kl_kind(self) -> str:
        return self.kl_kind or ("k1" if self.kl_place == "reward" else "k3_plus")

    # -- rollouts to advantages ------------------------------------------------------------------

    @torch.no_grad()
    def prepare(
        self,
        rollouts: Sequence[Rollout],
        *,
        beta: float,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> Prepared:
        """Rewards, advantages and returns of rollouts that carry log-probabilities and values.

        Args:
            rollouts: with `old_logprobs`, with `values` where there is a critic, and with
                `ref_logprobs` unless `beta` is 0.
            beta: strength of the KL penalty, score units per nat.
            reduce: sums a vector over ranks, where each holds a part of the rollouts; None where every
                rank holds all.

        Raises:
            ShapeError: no rollouts, or one that lacks what is needed.
            ConfigError: a penalty without a reference.
        """
        rows = Rows.of(rollouts, beta)
        # 1. what is worth what
        finished_B = torch.tensor([rollout.finished for rollout in rollouts])
        mask_BL = rows.mask_BL
        if self.truncation == "mask":
            mask_BL = mask_BL & finished_B[:, None]
        scores_B = self._scores(rollouts, finished_B)
        log_ratio_BL = rows.old_BL - rows.ref_BL
        rewards_BL = shape_rewards(
            scores_B,
            log_ratio_BL,
            mask_BL,
            beta=beta if self.kl_place == "reward" else 0.0,
            token_rewards_BL=rows.token_rewards_BL,
        )
        if self.whiten_rewards:
            rewards_BL = whiten(rewards_BL, mask_BL, center=False, reduce=reduce)
        # 2. advantages, and returns before these are whitened
        advantages_BL, returns_BL = gae(
            rewards_BL,
            rows.values_BL,
            mask_BL,
            gamma=self.gamma,
            lam=self.lam,
            lam_value=self.lam_value,
            bootstrap_B=self._after_the_cut(rollouts, finished_B),
        )
        raw_BL = advantages_BL
        if self.whiten_advantages:
            advantages_BL = whiten(advantages_BL, mask_BL, reduce=reduce)
        # 3. one row per rollout
        ratio_BL = policy_ratio(rows.old_BL, rows.sampler_BL, rows.mask_BL)
        importance_BL = ratio_BL.clamp(max=MAX_IMPORTANCE)  # of a sampler that was warped; one elsewhere
        made = [
            to_row(
                rollout,
                mask_BL[i],
                {
                    "old_logprobs": rows.old_BL[i],
                    "ref_logprobs": rows.ref_BL[i],
                    "old_values": rows.values_BL[i],
                    "advantages": advantages_BL[i],
                    "returns": returns_BL[i],
                    "importance": importance_BL[i],
                },
                beta,
            )
            for i, rollout in enumerate(rollouts)
        ]
        metrics = rollout_metrics(
            rows,
            mask_BL,
            scores_B,
            finished_B,
            rewards_BL=rewards_BL,
            advantages_BL=raw_BL,
            returns_BL=returns_BL,
        )
        return Prepared(made, metrics)

    def _scores(self, rollouts: Sequence[Rollout], finished_B: Tensor) -> Tensor:
        """Scores, with what an unfinished row loses."""
        scores_B = torch.tensor([0.0 if rollout.score is None else rollout.score for rollout in rollouts])
        if self.score_clip is not None:
            scores_B = scores_B.clamp(-self.score_clip, self.score_clip)
        if self.missing_stop_score is not None:
            return torch.where(finished_B, scores_B, torch.full_like(scores_B, self.missing_stop_score))
        return scores_B - self.missing_stop_penalty * (~finished_B).float()

    def _after_the_cut(self, rollouts: Sequence[Rollout], finished_B: Tensor) -> Tensor:
        if self.truncation != "bootstrap":
            return torch.zeros(len(rollouts))
        lacking = [
            i for i, rollout in enumerate(rollouts) if not rollout.finished and rollout.end_value is None
        ]
        if lacking:
            raise ShapeError(
                "PPO.prepare: expected end_value in unfinished rollouts for truncation='bootstrap', got none "
                f"in {lacking[:5]}. Set it, or take truncation='terminal'."
            )
        values_B = torch.tensor([rollout.end_value or 0.0 for rollout in rollouts])
        return values_B * (~finished_B).float()

    # -- the loss --------------------------------------------------------------------------------

    def counts(self, batch: PackedBatch) -> Mapping[str, Tensor]:
        """Sampled tokens for every term but ``ptx``, whose are the trained tokens of its own rows."""
        ptx_N = is_ptx(batch)
        sampled, text = (~ptx_N).float().sum(), (batch.weights_N * ptx_N).sum()
        return {name: text if name == "ptx" else sampled for name in self._terms}

    @property
    def _terms(self) -> list[str]:
        terms = {
            "policy": self.policy,
            "value": self.critic,
            "kl": self.policy and self.kl_place == "loss",
            "entropy": self.policy and self.entropy_coef > 0,
            "ptx": self.policy and self.ptx_coef > 0,
        }
        return [name for name, wanted in terms.items() if wanted]

    def __call__(self, model: nn.Module, batch: PackedBatch) -> LossOutput:
        """Terms and metrics of one micro-batch: see `of`."""
        if not self.policy:
            scored = forward(model, batch, logprobs=False, values=True, detach_values=not self.trunk)
            return self.of(scored, batch)
        scored = forward(
            model,
            batch,
            temperature=self.temperature,
            entropy="gradient" if "entropy" in self._terms else False,
            values=self.critic,
            detach_values=not self.trunk,
        )
        return self.of(scored, batch)

    def of(self, scored: Scored, batch: PackedBatch) -> LossOutput:
        """Terms and metrics of what the policy and its critic say of a micro-batch.

        Metrics of the policy, means over sampled tokens: ``approx_kl`` is ``(log pi - log pi_old)^2 / 2``;
        ``clip_fraction`` of ratios outside the clip; ``ratio_deviation`` is ``abs(rho - 1)``.

        Args:
            scored: at the sampling temperature, with values where there is a critic; without
                log-probabilities where there is no policy.
            batch: of the rows that `prepare` made.
        """
        mask_N = ~is_ptx(batch)
        count = mask_N.float().sum()
        terms, metrics = self._of_policy(scored, batch, mask_N, count) if self.policy else ({}, {})
        if self.critic:
            extras = batch.token_extras
            values_N = _given(scored.values_N, "values")
            errors_N = ppo_value(
                values_N, extras["old_values"], extras["returns"], mask_N, clip=self.value_clip
            )
            terms["value"] = Mean(self.value_coef * errors_N.sum(), count)
        return LossOutput(terms, metrics)

    def _of_policy(
        self, scored: Scored, batch: PackedBatch, mask_N: Tensor, count: Tensor
    ) -> tuple[dict[str, Mean], dict[str, Mean]]:
        extras, logprobs_N = batch.token_extras, scored.logprobs_N
        old_N = extras["old_logprobs"]
        losses_N = ppo_policy(
            logprobs_N,
            old_N,
            extras["advantages"],
            mask_N,
            clip=self.clip,
            dual=self.dual,
            importance_BL=extras["importance"],
        )
        terms = {"policy": Mean(losses_N.sum(), count)}
        with torch.no_grad():
            ratio_N = policy_ratio(logprobs_N, old_N, mask_N)
        if "kl" in self._terms:
            kl_N = kl_estimate(logprobs_N, extras["ref_logprobs"], kind=self._kl_kind, mask=mask_N)
            beta_N = batch.extras["beta"][batch.owner_N]
            terms["kl"] = Mean((beta_N * ratio_N * kl_N * mask_N).sum(), count)
        if "entropy" in self._terms:
            entropy_N = _given(scored.entropy_N, "entropy")
            terms["entropy"] = Mean(-self.entropy_coef * (entropy_N * mask_N).sum(), count)
        if "ptx" in self._terms:
            weights_N = batch.weights_N * ~mask_N
            text = (weights_N * nll(logprobs_N)).sum()
            terms["ptx"] = Mean(self.ptx_coef * text, weights_N.sum())
        return terms, self._watched(logprobs_N.detach(), old_N, ratio_N, mask_N, count)

    def _watched(
        self, logprobs_N: Tensor, old_N: Tensor, ratio_N: Tensor, mask_N: Tensor, count: Tensor
    ) -> dict[str, Mean]:
        low, high = self.clip if isinstance(self.clip, tuple) else (self.clip, self.clip)
        outside_N = ((ratio_N < 1 - low) | (ratio_N > 1 + high)) & mask_N
        squares_N = torch.where(mask_N, (logprobs_N - old_N).square() / 2, torch.zeros_like(ratio_N))
        return {
            "approx_kl": Mean(squares_N.sum(), count),
            "clip_fraction": Mean(outside_N.float().sum(), count),
            "ratio_deviation": Mean(((ratio_N - 1).abs() * mask_N).sum(), count),
        }


def _given(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ShapeError(f"PPO: expected {name} in what was scored, got none. Ask the forward for them.")
    return value
