"""Proximal policy optimisation of a language model: `train()` is `update(rollout(prompts))` in a loop.

    rollout    1. complete the prompts    2. have the completions valued
    update     3. read log-probabilities and values once    4. rewards, advantages, returns
               5. epochs x minibatches optimiser steps on them    6. move the KL penalty

The loss is `objectives.PPO`; its formulas are `losses.shape_rewards`, `gae`, `ppo_policy`, `ppo_value`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar, final

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ftlib.adapters.attach import AnyModel
from ftlib.batches import Mean, Rollout
from ftlib.data.encode import Encoder
from ftlib.engine.config import TrainConfig
from ftlib.engine.determinism import forked_rng, modes
from ftlib.engine.engine import Engine, Stopped
from ftlib.engine.ppo_config import PPOConfig
from ftlib.errors import CapabilityError, ConfigError
from ftlib.losses import RunningMoments
from ftlib.models.references import Kind, Reference, make_reference
from ftlib.objectives import PPO, Objective
from ftlib.objectives.rollout_rows import Example
from ftlib.rollouts import Sampler, TransformersSampler
from ftlib.trainers.base import Trainer
from ftlib.trainers.inputs import AnyAdapter, check_ids
from ftlib.trainers.options import checked_settings
from ftlib.trainers.ppo_collect import Collector
from ftlib.trainers.ppo_critic import RATE_SHARE, CriticKind
from ftlib.trainers.ppo_given import given_rollouts, mean_reward
from ftlib.trainers.ppo_health import Health
from ftlib.trainers.ppo_inputs import (
    AnyReward,
    asking_of,
    decoder_of,
    encode_prompts,
    resolve_reward,
    sampling_of,
)
from ftlib.trainers.ppo_metrics import derived, speed, summary
from ftlib.trainers.ppo_objective import SHARED, check_objective
from ftlib.trainers.ppo_phase import Moved, Phase, scaled
from ftlib.trainers.ppo_roles import Given, check_roles, make_learners, penalty_of
from ftlib.trainers.ppo_samples import sample_table
from ftlib.trainers.ppo_steps import minibatches, ptx_rows
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
    rate_share: ClassVar[float] = RATE_SHARE
    _rollout_metrics: Mapping[str, Mean] = {}  # for the next update
    _last: Sequence[Rollout] = ()  # rows of the last one
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
        self._given = Given(reward, reference, critic, sampler)
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
        return PPO(critic=self._given.critic == "head", **named)

    def make_engine(self, objective: Objective) -> Engine:
        """The policy's engine and the other roles, all made of the weights the policy has now."""
        config, given, model = self.config, self._given, self.model
        check_roles(given, model, config, self.steps)
        self.learners = learners = make_learners(
            given,
            model,
            objective,
            config,
            rollouts=self.steps,
            rate=self.learning_rate,
            before_update=lambda: self.callbacks.dispatch("on_pre_optimizer_step"),
            after_update=lambda: self.callbacks.dispatch("on_optimizer_step"),
        )
        engine, self.critic, self.objective = learners.engine, learners.critic, learners.objective
        # of the engine's own forward, so that it has the precision of the steps
        self.reference = make_reference(given.reference, engine.scorer, temperature=config.temperature)
        self.reward = resolve_reward(given.reward, model, self.tokenizer, trained=learners.models)
        self._decode = decoder_of(self.tokenizer)
        self.sampling = sampling_of(config, self.model, self.tokenizer)
        self.collect = Collector(
            engine,
            given.sampler or TransformersSampler(model, self.tokenizer, poll=self._poll),
            self.reward,
            self.sampling,
            self._decode,
            config.seed,
            asking_of(config),
        )
        self.kl, self.moments, self.health = penalty_of(config), RunningMoments(), Health(config)
        return engine

    def _poll(self) -> None:
        """A stop may cut the sampling, of which nothing stays."""
        if self.engine.accelerator.num_processes == 1 and self._stops.asked:
            raise Stopped

    def stateful_parts(self) -> Mapping[str, Stateful]:
        """Reference, critic, controller, running moments, and what the warnings compare with."""
        parts = {name: getattr(self, name) for name in ("reference", "critic", "kl", "moments", "health")}
        return {name: part for name, part in parts.items() if isinstance(part, Stateful)}

    # -- the algorithm -----------------------------------------------------------------------------

    def learn(self, rows: Examples) -> Mapping[str, Any]:
        """One step of the plan, or what is left of one that a stop has cut."""
        phase = self.boundary.phase
        if phase is None:
            return self.update(self.rollout(rows))
        if phase.rollouts[0].sampling == self.sampling:
            return self._improved(phase)
        logger.warning("the settings of sampling changed: the rollouts that were kept are left out")
        return self.update(self.rollout(rows))

    def rollout(self, prompts: Any) -> list[Rollout]:
        """Complete prompts with the policy as it is now, and have the completions valued.

        Args:
            prompts: as for the trainer; `samples_per_prompt` completions of each.

        Returns:
            Rows with a reward; those without one are counted in the next `update`'s "dropped".
        """
        started = perf_counter()
        rows = self._encoded(prompts, "rollout")
        collected = self.collect(rows, iteration=self.iteration, version=self.iteration)
        per_second = speed(float(collected.metrics["completion_tokens"].sum), perf_counter() - started)
        self._rollout_metrics = {**collected.metrics, "rollout_tokens_per_second": per_second}
        return collected.rollouts

    def update(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Improve the policy on rollouts of it: `epochs_per_rollout` passes of `minibatches` steps.

        Args:
            rollouts: of this policy; log-probabilities and values that they lack are computed.

        Returns:
            The row that a run would log.
        """
        started = perf_counter()
        with self.learners.modes_kept():
            # 1. numbers that stay fixed during the update
            known, entropy = self.learners.read(rollouts, self.reference)
        scores = [rollout.score for rollout in known if rollout.score is not None]
        if self.config.scale_scores and scores:
            self.moments.update(torch.tensor(scores))
        told, self._rollout_metrics = {**self._rollout_metrics, "entropy": entropy}, {}
        return self._improved(Phase(known, told, seconds=perf_counter() - started))

    def _improved(self, phase: Phase) -> dict[str, float]:
        """The rest of an update; a stop between two minibatches leaves what is left of it to the next run."""
        started, self.boundary.phase = perf_counter() - phase.seconds, None
        with self.learners.modes_kept():
            # 2. rewards, advantages, returns
            rollouts = scaled(phase.rollouts, self.moments) if self.config.scale_scores else phase.rollouts
            prepared = self.objective.prepare(rollouts, beta=self.kl.beta)
            # 3. optimiser steps
            every = minibatches(prepared.rows, self.config, self.iteration)
            for rows in islice(every, len(phase.moved), None):
                if self._asked_to_stop():
                    phase.seconds, self.boundary.phase = perf_counter() - started, phase
                    raise Stopped
                phase.moved.append(self._step(rows))
        # 4. what to tell, and the penalty of the next rollout
        self._last, phase.seconds = phase.rollouts, perf_counter() - started
        rate = float(self.engine.optimizer.param_groups[0]["lr"])
        result = summary(phase, prepared, beta=self.kl.beta, rate=rate)
        kl = prepared.metrics["kl"]
        self.kl.update(float(kl.value), int(kl.count))
        row = self._count(result, len(phase.rollouts))
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
            decode=self._decode if self.sampling.stop_strings else None,
        )
        of_all = torch.tensor(float(len(queries)))
        self._rollout_metrics = {"dropped": Mean(of_all - len(made), of_all)}
        return self.update(made)

    @property
    def iteration(self) -> int:
        """Updates made so far."""
        return self.boundary.counters.step

    def _step(self, rows: Sequence[Example]) -> Moved:
        warming = self.iteration < self.config.critic_warmup
        draw = (self.config.seed, self.engine.schedule.last_epoch, 7)
        return self.learners.step(rows, ptx_rows(self.ptx_data, len(rows), draw), warming=warming)

    def shown(self, row: dict[str, float]) -> dict[str, float]:
        """With explained variance and standard deviations in place of the squares they come from."""
        return derived(row)

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The rows of the last update as a table: prompt, completion, reward, kl, finished.

        In a notebook: ``pandas.DataFrame(trainer.samples)``.
        """
        return sample_table(self._last, self._decode)

    # -- the model in use --------------------------------------------------------------------------

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """Mean reward, length and share of finished completions of the evaluation prompts, sampled.

        "eval_loss" is the mean reward with a minus. Changes nothing; the same random numbers every time.
        """
        rows = self._evaluated(dataset)
        with forked_rng(), modes(self.model):
            collected = self.collect(rows, iteration=0, version=self.iteration)
        metrics = {f"eval_{name}": float(mean.value) for name, mean in collected.metrics.items()}
        return {"eval_loss": -float(mean_reward(collected.rollouts).value), **metrics}

    def predictions(self, data: Examples) -> list[dict[str, Any]]:  # noqa: ARG002
        """Refused: PPO has prompts, not examples."""
        raise CapabilityError(f"predict: {self.no_predictions}")

    def _encoded(self, data: Any, name: str) -> Any:
        prompts = encode_prompts(data, lambda: self.encoder, name)
        check_ids(prompts, self.model, name)
        return prompts
