"""Proximal policy optimisation of a language model: `train()` is `update(rollout(prompts))` in a loop.

    rollout    1. complete the prompts    2. have the completions valued
    update     3. read log-probabilities and values once    4. rewards, advantages, returns
               5. epochs x minibatches optimiser steps on them    6. move the KL penalty

The loss is `objectives.PPO`; its formulas are `losses.shape_rewards`, `gae`, `ppo_policy`, `ppo_value`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, cast, final

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ftlib.adapters.attach import AnyModel
from ftlib.batches import Mean, Rollout
from ftlib.data.encode import Encoder
from ftlib.engine.config import TrainConfig
from ftlib.engine.determinism import forked_rng, modes
from ftlib.engine.engine import Engine, StepResult, Stopped
from ftlib.engine.launch import refuse_sharding
from ftlib.engine.ppo_config import PPOConfig
from ftlib.errors import CapabilityError, ConfigError, ShapeError
from ftlib.losses import AdaptiveKL, FixedKL, RunningMoments
from ftlib.models.modes import no_dropout
from ftlib.models.references import Kind, Reference, make_reference
from ftlib.objectives import PPO, Objective
from ftlib.objectives.ppo import Prepared
from ftlib.objectives.rollout_rows import Example, examples, ptx_row
from ftlib.objectives.rollout_scoring import read_rollouts
from ftlib.rollouts import Collected, Sampler, TransformersSampler
from ftlib.rollouts.rewards import Reward
from ftlib.trainers.base import Trainer
from ftlib.trainers.inputs import AnyAdapter, check_ids
from ftlib.trainers.options import checked_settings
from ftlib.trainers.ppo_critic import CriticKind, OwnCritic, make_critic, value_head_of, value_rate
from ftlib.trainers.ppo_given import given_rollouts, mean_reward
from ftlib.trainers.ppo_health import Health, agreement_of
from ftlib.trainers.ppo_inputs import (
    AnyReward,
    asking_of,
    encode_prompts,
    resolve_reward,
    sampling_of,
)
from ftlib.trainers.ppo_metrics import derived, merged, on_cpu, speed
from ftlib.trainers.ppo_objective import SHARED, check_objective
from ftlib.trainers.ppo_phase import collect_on_ranks
from ftlib.trainers.ppo_samples import sample_table
from ftlib.trainers.snapshot import Stateful
from ftlib.trainers.trained import Examples

__all__ = ["PPOTrainer"]

logger = logging.getLogger(__name__)


@final
class PPOTrainer(Trainer):
    """Trains a policy to write completions of higher reward, near a reference.

    Args:
        model: the policy; see `Trainer`.
        prompts: strings, message lists, or records with a "prompt"; their other columns go to the reward.
        eval_prompts: likewise, for `evaluate`.
        tokenizer: see `Trainer`.
        adapter: see `Trainer`.
        reward: a function of (prompts, completions, **columns) that gives one number per row, None for a
            row to leave out, a tensor of token rewards, or a `RewardOut`; plain or async. Or a reward
            model, or the folder of a reward adapter trained on this base, with which it then shares it.
        reference: "auto" takes the base under a fresh adapter and a copy of the present weights otherwise;
            see `DPOTrainer`. None needs ``kl_coef=0``.
        critic: "head" reads values off the policy's trunk, "adapter" trains a second adapter on the same
            base, or a model of its own.
        sampler: draws completions; None samples from the policy in memory.
        config: a `PPOConfig`.
        callbacks: see `Trainer`.
        encoder: see `Trainer`; its formatter lays out prompts.
        objective: replaces the `objectives.PPO` that the settings describe.
        ptx_dataset: records whose likelihood joins every step, with `PPOConfig.ptx_coef`.

    Raises:
        ConfigError: options that clash.
        CapabilityError: a model, adapter or sampler that PPO cannot use.

    Example:
        >>> def shorter(prompts, completions, **_):
        ...     return [-len(text) / 100 for text in completions]
        >>> trainer = PPOTrainer(model, prompts, reward=shorter)  # doctest: +SKIP
        >>> for rows in batches_of(prompts):  # doctest: +SKIP
        ...     trainer.update(trainer.rollout(rows))
    """

    config: PPOConfig
    settings: ClassVar[type[TrainConfig]] = PPOConfig
    no_predictions: ClassVar[str] = "expected a trainer of examples, got PPO. Use rollout(prompts)."

    def __init__(
        self,
        model: AnyModel | str | Path,
        prompts: Any,
        eval_prompts: Any = None,
        *,
        reward: AnyReward,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapter: AnyAdapter | None = None,
        reference: Kind | nn.Module | Reference | None = "auto",
        critic: CriticKind | AnyModel = "head",
        sampler: Sampler | None = None,
        config: PPOConfig | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        encoder: Encoder | None = None,
        objective: PPO | None = None,
        ptx_dataset: Any = None,
    ) -> None:
        settings = checked_settings(config, PPOConfig, "PPOTrainer")
        check_objective(objective, settings)
        if (ptx_dataset is None) != (settings.ptx_coef == 0):
            raise ConfigError("PPOTrainer: ptx_dataset and PPOConfig.ptx_coef need each other. Give both.")
        self._critic_kind, self._given_reward, self._given_sampler = critic, reward, sampler
        self._given_reference = reference
        self.critic: OwnCritic | None = None
        super().__init__(
            model,
            prompts,
            eval_prompts,
            tokenizer=tokenizer,
            adapter=adapter,
            config=settings,
            callbacks=callbacks,
            objective=objective,
            encoder=encoder,
        )
        self.ptx_data = None if ptx_dataset is None else super()._encoded(ptx_dataset, "ptx_dataset")

    # -- construction: the parts of the algorithm ------------------------------------------------

    @property
    def examples_per_step(self) -> int:
        """Prompts of one rollout phase."""
        return self.config.prompts

    def default_objective(self) -> PPO:
        """`objectives.PPO` with the settings of the run."""
        named = {name: getattr(self.config, name) for name in SHARED}
        return PPO(critic=self._critic_kind == "head", **named)

    def make_engine(self, objective: Objective) -> Engine:
        """The policy's engine and the other roles, all made of the weights the policy has now."""
        refuse_sharding(
            "PPOTrainer", "its sampler and its roles run the policy outside of the prepared forward"
        )
        config, given = self.config, cast(PPO, objective)
        own_critic = self._critic_kind != "head"
        self.objective = replace(given, critic=False) if own_critic else given
        per_rollout = config.epochs_per_rollout * config.minibatches
        if self._given_reference is None and config.kl_coef:
            raise ConfigError(
                f"PPOTrainer: kl_coef={config.kl_coef} needs a reference. Give one, or kl_coef=0."
            )
        if config.critic_warmup >= self.steps:
            logger.warning(
                "critic_warmup=%d covers all %d rollouts: the policy is not trained. Raise max_steps.",
                config.critic_warmup,
                self.steps,
            )
        self.critic = make_critic(
            self._critic_kind,
            self.model,
            self.objective,
            config,
            steps=self.steps * per_rollout,
            rate=self.learning_rate,
        )
        # rollouts in which the policy's own schedule stands still
        alone = min(config.critic_warmup, self.steps - 1) if own_critic else 0
        engine = Engine(
            self.model,
            self.objective,
            config,
            (self.steps - alone) * per_rollout,
            self.learning_rate,
            value_head=value_head_of(self.model) if self.objective.critic else None,
            value_learning_rate=value_rate(config, self.learning_rate, self.model),
            before_update=lambda: self.callbacks.dispatch("on_pre_optimizer_step"),
            after_update=lambda: self.callbacks.dispatch("on_optimizer_step"),
        )
        # of the engine's own forward, so that it has the precision of the steps
        self.reference = make_reference(self._given_reference, engine.scorer, temperature=config.temperature)
        self.reward: Reward = resolve_reward(
            self._given_reward,
            self.model,
            self.tokenizer,
            trained=[self.model] if self.critic is None else [self.model, self.critic.engine.model],
        )
        self.sampler_of_policy = self._given_sampler or TransformersSampler(
            self.model, self.tokenizer, poll=self._poll
        )
        self.kl = (
            FixedKL(config.kl_coef)
            if config.kl_target is None
            else AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
        )
        self.moments = RunningMoments()
        self.health = Health(config)
        self.sampling = sampling_of(config, self.model, self.tokenizer)
        return engine

    def _poll(self) -> None:
        """A stop may cut a rollout, of which nothing stays; never an update, which is all or nothing."""
        if self.engine.accelerator.num_processes == 1 and self._stops.asked:
            raise Stopped

    def stateful_parts(self) -> Mapping[str, Stateful]:
        """Reference, critic, controller, running moments, and what the warnings compare with."""
        parts: dict[str, object] = {
            "reference": self.reference,
            "critic": self.critic,
            "kl": self.kl,
            "moments": self.moments,
            "health": self.health,
        }
        return {name: part for name, part in parts.items() if isinstance(part, Stateful)}

    # -- the algorithm -----------------------------------------------------------------------------

    def learn(self, rows: Examples) -> Mapping[str, Any]:
        """One step of the plan."""
        return self.update(self._sampled(rows))

    def rollout(self, prompts: Any) -> list[Rollout]:
        """Complete prompts with the policy as it is now, and have the completions valued.

        Args:
            prompts: as for the trainer; `samples_per_prompt` completions of each.

        Returns:
            Rows with a reward; those without one are counted in the next `update`'s "dropped".
        """
        return self._sampled(self._encoded(prompts, "rollout"))

    def update(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Improve the policy on rollouts of it: `epochs_per_rollout` passes of `minibatches` steps.

        Args:
            rollouts: of this policy; log-probabilities and values that they lack are computed.

        Returns:
            The row that a run would log.
        """
        started = perf_counter()
        with self._modes_kept():
            # 1. numbers that stay fixed during the update
            known, entropy = self._read(rollouts)
            # 2. rewards, advantages, returns
            prepared = self.objective.prepare(self._scaled(known), beta=self.kl.beta)
            # 3. optimiser steps
            results = [self._step(prepared.rows, rows) for rows in self._minibatches(prepared.rows)]
        # 4. what to tell, and the penalty of the next rollout
        self._last = known
        told = {"reward": mean_reward(rollouts), "entropy": entropy, **agreement_of(known)}
        told["update_tokens_per_second"] = speed(self._tokens(prepared.rows), started)
        summary = self._summary(results, prepared, told)
        kl = prepared.metrics["kl"]
        self.kl.update(float(kl.value), int(kl.count))
        row = self._count(summary, len(rollouts))
        self.health.look(row)
        return row

    def step(  # type: ignore[override]  # PPO's step takes what was said, not examples
        self,
        queries: Sequence[Any],
        responses: Sequence[Any],
        rewards: Sequence[Any],
        *,
        masks: Sequence[Any] | None = None,
        finished: Sequence[bool] | None = None,
        logprobs: Sequence[Any] | None = None,
    ) -> dict[str, float]:
        """`update` on completions and rewards of one's own.

        Args:
            queries: prompts: strings, token ids or tensors.
            responses: completions: strings, token ids or tensors, without padding, with the stop token if
                it was drawn.
            rewards: a number each, token rewards, a `RewardOut`, or None to leave the row out.
            masks: bool per response token, False where the policy did not sample; None is all True.
            finished: whether each ended by itself; None reads it from the last sampled token and the stop
                strings.
            logprobs: of the distribution that was sampled; needed with top-p or top-k.
        """
        made = given_rollouts(
            queries,
            responses,
            rewards,
            masks=masks,
            finished=finished,
            logprobs=logprobs,
            sampling=self.sampling,
            query_ids=lambda text: list(self.encoder.encode_prompt(text)),
            response_ids=lambda text: self._needed_tokenizer().encode(text, add_special_tokens=False),
            decode=self._decode() if self.sampling.stop_strings else None,
        )
        dropped, rows = float(len(queries) - len(made)), float(len(queries))
        self._rollout_metrics = {"dropped": Mean(torch.tensor(dropped), torch.tensor(rows))}
        return self.update(made)

    # -- its steps ---------------------------------------------------------------------------------

    @property
    def iteration(self) -> int:
        """Updates made so far."""
        return self.boundary.counters.step

    def _sampled(self, rows: Examples) -> list[Rollout]:
        started = perf_counter()
        collected = self._collected(rows, self.iteration)
        per_second = speed(float(collected.metrics["completion_tokens"].sum), started)
        self._rollout_metrics = {**collected.metrics, "rollout_tokens_per_second": per_second}
        return collected.rollouts

    def _collected(self, rows: Examples, iteration: int) -> Collected:
        self.sampler_of_policy.sync(self.model, self.iteration)
        return collect_on_ranks(
            self.engine,
            self.sampler_of_policy,
            rows,
            self.reward,
            self.sampling,
            decode=self._decode(),
            seed=self.config.seed,
            iteration=iteration,
            asking=asking_of(self.config),
        )

    def _decode(self) -> Callable[[Sequence[int]], str] | None:
        tokenizer = self.tokenizer
        return None if tokenizer is None else lambda ids: str(tokenizer.decode(list(ids)))

    def _read(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Mean]:
        if not rollouts:
            raise ShapeError("PPOTrainer.update: expected at least one rollout, got none.")
        policy = self.engine.scorer
        critic = policy if self.objective.critic else None
        if self.critic is not None:
            critic = self.critic.engine.scorer
        with torch.no_grad():
            policy.train()
            return read_rollouts(
                rollouts,
                policy,
                critic=critic,
                reference=self.reference,
                temperature=self.config.temperature,
                max_tokens=self.engine.max_tokens,
                device=self.engine.device,
            )

    def _scaled(self, rollouts: Sequence[Rollout]) -> Sequence[Rollout]:
        """Scores over their running standard deviation, where asked for; their mean stays."""
        scored = [rollout.score for rollout in rollouts if rollout.score is not None]
        if not self.config.scale_scores or not scored:
            return rollouts
        self.moments.update(torch.tensor(scored))
        return [
            rollout
            if rollout.score is None
            else replace(rollout, score=float(self.moments.scale(torch.tensor(rollout.score))))
            for rollout in rollouts
        ]

    @staticmethod
    def _tokens(rows: Sequence[Example]) -> int:
        """Tokens of the rows, prompts included."""
        return sum(int(row["length"]) for row in rows)

    def _minibatches(self, rows: Sequence[Example]) -> Iterator[list[int]]:
        """Of every epoch, the rows of each minibatch: an order from (seed, iteration, epoch) alone.

        Rows of which no token counts are left out; fewer rows than minibatches make one each.
        """
        counted = [i for i, row in enumerate(rows) if bool(row["continuation_weights"][0].any())]
        places = np.array(counted or range(len(rows)))
        for epoch in range(self.config.epochs_per_rollout):
            order = np.random.default_rng((self.config.seed, self.iteration, epoch)).permutation(places)
            for part in np.array_split(order, min(self.config.minibatches, len(order))):
                yield sorted(int(index) for index in part)  # of one prompt next to each other

    def _step(self, rows: Sequence[Example], chosen: Sequence[int]) -> list[StepResult]:
        """One minibatch: the policy's optimiser step, and the critic's own where it has one."""
        minibatch = examples([rows[index] for index in chosen], max_tokens=self.engine.max_tokens)
        with_text = minibatch + [ptx_row(row) for row in self._ptx_rows(len(chosen))]
        warming = self.iteration < self.config.critic_warmup and (
            self.critic is not None or self.objective.critic
        )
        results = []
        with no_dropout(self.model):
            if not warming:
                results.append(self.engine.step(with_text))
            elif self.critic is None:
                self.engine.objective = replace(
                    self.objective, policy=False, trunk=False, entropy_coef=0.0, ptx_coef=0.0
                )
                try:
                    results.append(self.engine.step(minibatch))
                finally:
                    self.engine.objective = self.objective
        if self.critic is not None:
            with no_dropout(self.critic.engine.model):
                results.append(self.critic.engine.step(minibatch))
        return results

    @contextmanager
    def _modes_kept(self) -> Iterator[None]:
        """Every module of policy and critic gets its mode back, after an exception too."""
        with ExitStack() as scope:
            for model in (self.model, *([] if self.critic is None else [self.critic.engine.model])):
                scope.enter_context(modes(model))
            yield

    def _ptx_rows(self, rows: int) -> list[Mapping[str, Any]]:
        if self.ptx_data is None:
            return []
        random = np.random.default_rng((self.config.seed, self.engine.schedule.last_epoch, 7))
        return [self.ptx_data[int(index)] for index in random.integers(len(self.ptx_data), size=rows)]

    def _summary(
        self, results: Sequence[Sequence[StepResult]], prepared: Prepared, read: Mapping[str, Mean]
    ) -> StepResult:
        """All optimiser steps of an update as one, with what is told of the update as a whole."""
        every = list(chain.from_iterable(results))
        counted, terms, metrics = merged(every)
        one = torch.ones(())
        nothing = Mean(torch.zeros(()), one)  # of a policy that stood still
        told: dict[str, Mean] = {
            **dict.fromkeys(("approx_kl", "clip_fraction", "ratio_deviation"), nothing),
            **metrics,
            **self._rollout_metrics,
            **prepared.metrics,
            **read,
            "beta": Mean(torch.tensor(self.kl.beta), one),
            "first_ratio_deviation": on_cpu(counted[0].metrics.get("ratio_deviation", nothing)),
            "optimizer_steps": Mean(torch.tensor(float(len(results))), one),
        }
        last = results[-1][0]
        if self.critic is not None:
            told["grad_norm_critic"] = Mean(torch.tensor(results[-1][-1].grad_norm), one)
            if len(results[-1]) == 1:  # the critic's alone
                rate = float(self.engine.optimizer.param_groups[0]["lr"])
                last = replace(last, grad_norm=0.0, learning_rate=rate)
        self._rollout_metrics = {}
        return replace(
            last,
            terms=terms,
            metrics=told,
            tokens=self._tokens(prepared.rows),
            skipped=any(result.skipped for result in every),
        )

    _rollout_metrics: Mapping[str, Mean] = {}

    def shown(self, row: dict[str, float]) -> dict[str, float]:
        """With explained variance and standard deviations in place of the squares they come from."""
        return derived(row)

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The rows of the last update as a table: prompt, completion, reward, kl, finished.

        In a notebook: ``pandas.DataFrame(trainer.samples)``.
        """
        return sample_table(self._last, self._decode())

    _last: Sequence[Rollout] = ()

    # -- the model in use --------------------------------------------------------------------------

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """Mean reward, length and share of finished completions of the evaluation prompts, sampled.

        "eval_loss" is the mean reward with a minus. Changes nothing; the same random numbers every time.
        """
        rows = self._evaluated(dataset)
        with forked_rng(), modes(self.model):
            collected = self._collected(rows, iteration=0)
        metrics = {f"eval_{name}": float(mean.value) for name, mean in collected.metrics.items()}
        return {"eval_loss": -float(mean_reward(collected.rollouts).value), **metrics}

    def predictions(self, data: Examples) -> list[dict[str, Any]]:  # noqa: ARG002
        """Refused: PPO has prompts, not examples."""
        raise CapabilityError(f"predict: {self.no_predictions}")

    def _encoded(self, data: Any, name: str) -> Any:
        prompts = encode_prompts(data, lambda: self.encoder, name)
        check_ids(prompts, self.model, name)
        return prompts
