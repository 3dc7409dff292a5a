"""Direct preference optimisation. The loss is `objectives.DPO`, the formulas are in `losses.preference`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, final

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ftlib.adapters.attach import AnyModel
from ftlib.batches import PackedBatch
from ftlib.checks import COUNT, check, number
from ftlib.data.collate import collate
from ftlib.data.encode import Encoder
from ftlib.data.sampler import pack
from ftlib.engine.config import TrainConfig
from ftlib.errors import ConfigError
from ftlib.models import forward
from ftlib.models.modes import no_dropout
from ftlib.models.references import Cached, Kind, Reference, Snapshot
from ftlib.objectives import DPO, Objective, Weighted
from ftlib.objectives.dpo import PairLoss
from ftlib.objectives.protocol import Referring
from ftlib.trainers.base import Trainer
from ftlib.trainers.inputs import AnyAdapter
from ftlib.trainers.options import refuse_without_effect
from ftlib.trainers.snapshot import Stateful
from ftlib.trainers.trained import Examples

__all__ = ["DPOTrainer"]

logger = logging.getLogger(__name__)

LOOKED_AT = 4  # examples on which policy and reference are compared before the first step
FOLLOW_SHARE = 0.6  # of TR-DPO's soft updates
START_TOLERANCE = 1e-5  # of their log-probabilities' size, at least in nats


@final
class DPOTrainer(Trainer):
    """Moves the policy towards the better of two answers, as far from a reference as `beta` lets it.

    Takes preference records (``chosen`` and ``rejected``, or ranked ``answers``). The reference is the
    policy as it is when the trainer is made, unless another is given; its log-probabilities are computed
    once per example and kept. Dropout is off in both, in training too, so that the first loss is ln 2.

    Args:
        model: see `Trainer`.
        train_dataset: see `Trainer`.
        eval_dataset: see `Trainer`.
        tokenizer: see `Trainer`.
        adapter: see `Trainer`.
        config: see `Trainer`.
        callbacks: see `Trainer`.
        objective: see `Trainer`.
        encoder: see `Trainer`.
        beta: strength of the pull towards the reference, > 0.
        loss: "sigmoid", "ipo", "hinge", "robust", or a function with the signature of `losses.dpo`.
        label_smoothing: assumed share of swapped pairs, in [0, 0.5); for "sigmoid" (then cDPO) and "robust".
        ipo_reduction: "sum" gives IPO the sums of the other losses, as it was published.
        reference: "auto" takes the base under a fresh adapter, and a copy of the present weights otherwise.
            Or "adapter_off", "snapshot", "copy", a model, an object with ``logprobs(batch)``; None trains
            without one.
        reference_cache: True keeps the reference's log-probabilities in memory; a folder keeps them for
            later runs too; False computes them in every step.
        allow_initial_kl: train although policy and reference differ at the start.
        follow_every: steps after which the reference moves towards the policy, as in TR-DPO (Gorbatovski et
            al. 2024, arXiv 2404.09656); it is then a snapshot, and its log-probabilities are not kept. None
            leaves it where it is.
        follow_share: of the policy in the reference's new weights, in (0, 1]; 1 replaces them.

    Raises:
        ConfigError: an option out of range, or one without effect.

    Example:
        >>> trainer = DPOTrainer(model, pairs, tokenizer=tokenizer, beta=0.1)  # doctest: +SKIP
        >>> trainer.train().history[0]["loss"]  # doctest: +SKIP
    """

    compares: ClassVar[bool] = True
    # 4e-5 for LoRA and 4e-6 for all weights. Recipes for billions of weights and thousands of steps take
    # less: 5e-6 and 5e-7 in Zephyr (Tunstall et al. 2023), 1e-6 for all weights in trl
    rate_share: ClassVar[float] = 1 / 5

    def __init__(
        self,
        model: AnyModel | str | Path,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapter: AnyAdapter | None = None,
        config: TrainConfig | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        objective: Objective | None = None,
        encoder: Encoder | None = None,
        beta: float = 0.1,
        loss: str | PairLoss = "sigmoid",
        label_smoothing: float = 0.0,
        ipo_reduction: Literal["mean", "sum"] = "mean",
        reference: Kind | nn.Module | Reference | None = "auto",
        reference_cache: bool | str | Path = True,
        allow_initial_kl: bool = False,
        follow_every: int | None = None,
        follow_share: float = FOLLOW_SHARE,
    ) -> None:
        self._follow_every, self._follow_share = follow_every, follow_share
        if follow_every is not None:
            _check_following(follow_every, follow_share, reference, reference_cache, objective)
            reference, reference_cache = "snapshot", False
        elif follow_share != FOLLOW_SHARE:
            raise ConfigError("DPOTrainer: follow_share has no effect without follow_every. Give both.")
        refuse_without_effect(
            objective,
            {
                "beta": (beta, 0.1),
                "loss": (loss, "sigmoid"),
                "label_smoothing": (label_smoothing, 0.0),
                "ipo_reduction": (ipo_reduction, "mean"),
                "reference": (reference, "auto"),
                "follow_every": (follow_every, None),
            },
        )
        self._own = DPO(reference, beta, loss, label_smoothing, ipo_reduction)
        self._cache = reference_cache
        self._allow_initial_kl = allow_initial_kl
        super().__init__(
            model,
            train_dataset,
            eval_dataset,
            tokenizer=tokenizer,
            adapter=adapter,
            config=config,
            callbacks=callbacks,
            objective=objective,
            encoder=encoder,
        )
        if "margin" in getattr(self.train_data, "column_names", ()):
            logger.warning("DPOTrainer: the data's margins are not used; ftlib.RewardTrainer reads them.")
        # with the engine's own forward, so that a reference has the precision of the steps
        self.engine.objective = self._with_reference(self.engine.objective)

    def default_objective(self) -> Objective:
        """`objectives.DPO`."""
        return self._own

    def stateful_parts(self) -> Mapping[str, Stateful]:
        """The reference, beside the usual: it is a snapshot of weights that have moved since."""
        dpo = _dpo_in(self.engine.objective)
        kept = {"reference": dpo.reference} if dpo is not None and isinstance(dpo.reference, Stateful) else {}
        return {**super().stateful_parts(), **kept}

    def step(self, batch: PackedBatch | Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """See `Trainer.step`.

        Raises:
            ConfigError: policy and reference differ before the first step.
        """
        if self.boundary.counters.step == 0 and not self._allow_initial_kl:
            self._require_equal_start()
        with no_dropout(self.model):  # else policy and reference would differ by its noise
            row = super().step(batch)
        if self._follow_every is not None and self.boundary.counters.step % self._follow_every == 0:
            reference = cast(DPO, self.engine.objective).reference
            cast(Snapshot, reference).follow(self._follow_share)
        return row

    def predictions(self, data: Examples) -> list[dict[str, Any]]:
        """Of each answer, in order: ``logps`` in nats, and ``rewards``, beta times its log-ratio."""
        dpo = _dpo_in(self.engine.objective)
        if dpo is None:
            return super().predictions(data)
        # not through the cache: a row's last bits depend on its neighbours, and the first training step's
        # reference has those of the policy's own forward only if it was not computed before
        if isinstance(dpo.reference, Cached):
            dpo = replace(dpo, reference=dpo.reference.reference)
        rows: list[dict[str, Any]] = [{} for _ in data]
        for members in pack([int(row["length"]) for row in data], self.engine.max_tokens):
            batch = collate([data[index] for index in members]).to(self.engine.device)
            ratios = dpo.log_ratios(forward(self.engine.scorer, batch), dpo.prepare(batch))
            logps, rewards = iter(ratios.policy_C.tolist()), iter(ratios.reward_C.tolist())
            for index in members:
                answers = range(len(data[index]["continuation_ids"]))
                rows[index] = {
                    "logps": [next(logps) for _ in answers],
                    "rewards": [next(rewards) for _ in answers],
                }
        return rows

    def _with_reference(self, objective: Objective) -> Objective:
        """The objective with its reference made of the weights the policy has now."""
        if isinstance(objective, Referring):
            objective = objective.bound(self.engine.scorer, cache=self._cache)
        dpo = _dpo_in(objective)
        kept = dpo is not None and isinstance(dpo.reference, Cached)
        if not isinstance(self._cache, bool) and not kept:
            raise ConfigError(
                f"DPOTrainer: reference_cache={str(self._cache)!r} has no effect on this objective and "
                "reference, whose log-probabilities are not kept. Leave it out; those of an object of your "
                "own are kept by ftlib.models.Cached(reference, folder)."
            )
        return objective

    def _require_equal_start(self) -> None:
        """Policy and reference must agree on the first examples, as many as a micro-batch holds."""
        dpo = _dpo_in(self.engine.objective)
        if dpo is None or dpo.reference is None:
            return
        first = [self.train_data[index] for index in range(min(LOOKED_AT, len(self.train_data)))]
        answers = [
            (reward / dpo.beta, logp)
            for row in self.predict(first)
            for reward, logp in zip(row["rewards"], row["logps"], strict=True)
        ]
        worst, logp = max(answers, key=lambda answer: abs(answer[0]))
        if not abs(worst) <= START_TOLERANCE * max(1.0, abs(logp)):
            raise ConfigError(
                f"DPOTrainer: expected a policy that starts at its reference, got a log-ratio of {worst:.2g} "
                f"nats on an answer of {logp:.4g}. Make the trainer after the last change of the weights, or "
                "set allow_initial_kl=True."
            )


def _check_following(
    every: int, share: float, reference: object, cache: bool | str | Path, objective: Objective | None
) -> None:
    """A moving reference is one kind of reference, and what it said goes stale."""
    check("DPOTrainer", {"follow_every": (every, COUNT), "follow_share": (share, number(above=0, most=1))})
    if not (isinstance(reference, str) and reference in ("auto", "snapshot")) or objective is not None:
        raise ConfigError(
            "DPOTrainer: follow_every moves a snapshot of the policy that the trainer takes itself. Leave "
            "reference= and objective= out."
        )
    if not isinstance(cache, bool):
        raise ConfigError(
            "DPOTrainer: reference_cache has no effect on a reference that moves. Leave out one of "
            "reference_cache= and follow_every=."
        )


def _dpo_in(objective: Objective) -> DPO | None:
    """The DPO objective that an objective is, or holds."""
    if isinstance(objective, DPO):
        return objective
    members = [member for member, _ in objective.members] if isinstance(objective, Weighted) else []
    return next((found for found in map(_dpo_in, members) if found is not None), None)
