"""Direct preference optimisation: the policy is its own reward model, measured against a reference.

Shapes: N scored rows, C continuations, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal, Protocol, final, get_args

import torch
from torch import Tensor, nn

from ftlib.batches import LossOutput, PackedBatch
from ftlib.checks import check, number
from ftlib.errors import ConfigError, ShapeError
from ftlib.losses import dpo, hinge, ipo, robust_dpo
from ftlib.models import Scored, forward
from ftlib.models.references import Cached, KeptReference, Kind, Reference, make_reference
from ftlib.objectives.pairs import Pairs, pairs
from ftlib.objectives.protocol import Needs

__all__ = ["DPO", "LogRatios", "PairLoss"]

REFERENCE = "reference_logprobs"  # the extra that holds them, summed per continuation


class PairLoss(Protocol):
    """The signature of `losses.dpo`. An attribute ``reduction = "mean"`` asks for means per token."""

    def __call__(
        self,
        chosen_B: Tensor,
        rejected_B: Tensor,
        ref_chosen_B: Tensor,
        ref_rejected_B: Tensor,
        /,
        *,
        beta: float,
        label_smoothing: float,
    ) -> Tensor:
        """One loss per pair, from log-probabilities of whole completions."""


@final
@dataclass(frozen=True, eq=False)
class LogRatios:
    """What policy and reference say of whole continuations. Float64 where the device has it.

    Args:
        policy_C: sum of weighted log-probabilities, nats; carries the gradient.
        reference_C: the same of the reference; zero where there is none.
        tokens_C: what the loss divides both by: the sum of the weights for means per token, else 1.
        reward_C: beta times the log-ratio that the loss sees, detached.
    """

    policy_C: Tensor
    reference_C: Tensor
    tokens_C: Tensor
    reward_C: Tensor


LOSSES: Mapping[str, PairLoss] = {"sigmoid": dpo, "ipo": ipo, "hinge": hinge, "robust": robust_dpo}


@final
@dataclass(frozen=True)
class DPO:
    """A preference loss of log-probabilities under policy and reference; K completions are all their pairs.

        logp_c = sum of w_n log p_n over the tokens n of continuation c
        loss   = sum over groups of the mean over its pairs / number of groups

    For a loss whose ``reduction`` is "mean", logp_c is divided by the sum of its w_n.

    Metrics, means over pairs weighted like the loss:

    - ``reward_chosen``, ``reward_rejected``: beta times the log-ratio of policy to reference that the
      loss sees; ``margin``: their difference; ``accuracy``: how often it is above zero, a tie counts
      one half;
    - ``logp_chosen``, ``logp_rejected``: logp_c under the policy, never divided, nats per sequence;
    - ``kl``: log-ratio of policy to reference, the mean of both sides, nats per sequence. It estimates
      KL(policy || reference) as far as the completions might be the policy's own; it falls below zero
      when the policy leaves them. Left out where there is no reference.

    Args:
        reference: an object with ``logprobs(batch)``; or what `models.references.make_reference` takes
            ("auto", "snapshot", a model, ...), which `bound` turns into one: a trainer does that, with the
            policy's present weights. None: no reference, its log-probabilities count as zero. A batch
            whose extras hold ``reference_logprobs``, the reference's logp_c, needs none.
        beta: strength of the pull towards the reference, > 0.
        loss: "sigmoid", "ipo", "hinge", "robust", or a function with the signature of `losses.dpo`.
        label_smoothing: assumed share of swapped pairs, in [0, 0.5); for "sigmoid" and "robust".
        ipo_reduction: "sum" gives IPO the sums of the other losses, as it was published.

    Raises:
        ConfigError: an unknown loss, an option out of range, or one without effect on this loss.
    """

    reference: Reference | nn.Module | Kind | None = field(default="auto", hash=False)
    beta: float = 0.1
    loss: str | PairLoss = "sigmoid"
    label_smoothing: float = 0.0
    ipo_reduction: Literal["mean", "sum"] = "mean"

    needs: ClassVar[Needs] = Needs()

    def __post_init__(self) -> None:
        numbers = {
            "beta": (self.beta, number(above=0)),
            "label_smoothing": (self.label_smoothing, number(0, below=0.5)),
        }
        check("objectives.DPO", numbers)
        if not (self.loss in LOSSES if isinstance(self.loss, str) else callable(self.loss)):
            raise ConfigError(
                f"objectives.DPO: expected a loss of {list(LOSSES)} or a function with the signature of "
                f"losses.dpo, got {self.loss!r}."
            )
        known = (None, *get_args(Kind))
        if not isinstance(self.reference, Reference | nn.Module) and self.reference not in known:
            raise ConfigError(
                "objectives.DPO: expected a reference with logprobs(batch), a model, or one of "
                f"{list(known)}, got {self.reference!r:.80}."
            )
        if self.ipo_reduction not in ("mean", "sum"):
            raise ConfigError(
                f'objectives.DPO: expected ipo_reduction "mean" or "sum", got {self.ipo_reduction!r}.'
            )
        if self.ipo_reduction == "sum" and self._loss is not ipo:
            raise ConfigError(
                f"objectives.DPO: ipo_reduction has no effect on loss={self.loss!r}. Leave it out."
            )
        if self._reduction not in ("mean", "sum"):
            raise ConfigError(
                f'objectives.DPO: expected the reduction of {self.loss!r} to be "mean" or "sum", got '
                f"{self._reduction!r}."
            )
        # a tie shows whether the loss takes these options; one of the caller's gets the ranges of `dpo`
        tried = self._loss if self._loss in LOSSES.values() else dpo
        tie_B = torch.zeros(1)
        tried(tie_B, tie_B, tie_B, tie_B, beta=self.beta, label_smoothing=self.label_smoothing)

    @property
    def _loss(self) -> PairLoss:
        return LOSSES[self.loss] if isinstance(self.loss, str) else self.loss

    @property
    def _reduction(self) -> str:
        return self.ipo_reduction if self._loss is ipo else getattr(self._loss, "reduction", "sum")

    def counts(self, batch: PackedBatch) -> Mapping[str, Tensor]:
        """The number of groups."""
        return {"dpo": pairs(batch).count}

    def bound(self, model: nn.Module, *, cache: bool | str | Path = True) -> DPO:
        """With the reference that `reference` asks for, made from the weights `model` has now.

        Args:
            model: the policy.
            cache: True keeps its log-probabilities in memory, a folder for later runs too; False computes
                them for every batch. A reference of the caller's own is left as it is.
        """
        reference = make_reference(self.reference, model)
        if reference is not self.reference and isinstance(reference, KeptReference) and cache is not False:
            reference = Cached(reference, None if cache is True else cache)
        return replace(self, reference=reference)

    def prepare(self, batch: PackedBatch) -> PackedBatch:
        """The batch with the reference's log-probabilities in its extras.

        Raises:
            ConfigError: the reference is not made yet.
            ShapeError: it does not give one log-probability per scored token.
        """
        if self.reference is None:
            return batch
        if not isinstance(self.reference, Reference):
            if REFERENCE in batch.extras:
                return batch
            raise ConfigError(
                f"objectives.DPO: expected a reference with logprobs(batch), got {self.reference!r:.80}, of "
                "which it is still to be made. Call objective.bound(model); a trainer does."
            )
        with torch.no_grad():
            logprobs_N = self.reference.logprobs(batch)
        if logprobs_N.shape != batch.targets_N.shape:
            raise ShapeError(
                f"objectives.DPO: expected reference.logprobs(batch) with one number per scored token "
                f"[{len(batch.targets_N)}], got {tuple(logprobs_N.shape)}."
            )
        totals_C = _per_continuation(batch.weights_N * logprobs_N, batch)
        return replace(batch, extras={**batch.extras, REFERENCE: totals_C})

    def of(self, scored: Scored, batch: PackedBatch) -> LossOutput:
        """Loss and metrics of the policy's log-probabilities.

        Args:
            scored: what the policy says of the batch.
            batch: as `prepare` gave it; any other is prepared now.

        Raises:
            ShapeError: a loss that does not give one number per pair.
        """
        ratios = self.log_ratios(scored, batch)
        two = pairs(batch)
        sides = [
            logprobs_C[side_P]
            for logprobs_C in (ratios.policy_C / ratios.tokens_C, ratios.reference_C / ratios.tokens_C)
            for side_P in (two.chosen_P, two.rejected_P)
        ]
        losses_P = self._loss(*sides, beta=self.beta, label_smoothing=self.label_smoothing)
        if losses_P.shape != two.weight_P.shape:
            raise ShapeError(
                f"objectives.DPO: expected one loss per pair [{len(two.weight_P)}] from {self.loss!r}, got "
                f"{tuple(losses_P.shape)}. Do not reduce it: this objective sums and counts."
            )
        narrow = scored.logprobs_N.dtype
        shown = {name: values_P.to(narrow) for name, values_P in _shown(ratios, two).items()}
        if self.reference is None and REFERENCE not in batch.extras:
            del shown["kl"]
        return LossOutput(
            {"dpo": two.mean(losses_P.to(narrow))},
            {name: two.mean(values_P) for name, values_P in shown.items()},
        )

    def log_ratios(self, scored: Scored, batch: PackedBatch) -> LogRatios:
        """Log-probabilities of whole continuations under policy and reference. Arguments: see `of`."""
        batch = batch if REFERENCE in batch.extras else self.prepare(batch)
        policy_C = _per_continuation(batch.weights_N * scored.logprobs_N, batch)
        reference_C = batch.extras.get(REFERENCE, torch.zeros_like(policy_C))
        tokens_C = torch.ones_like(policy_C)
        if self._reduction == "mean":
            weight_C = _per_continuation(batch.weights_N, batch)
            tokens_C = torch.where(weight_C > 0, weight_C, tokens_C)  # nothing scored: 0 / 1
        reward_C = self.beta * (policy_C.detach() - reference_C) / tokens_C
        return LogRatios(policy_C, reference_C, tokens_C, reward_C)

    def __call__(self, model: nn.Module, batch: PackedBatch) -> LossOutput:
        """`of` the model's log-probabilities, after those of the reference."""
        batch = self.prepare(batch)
        return self.of(forward(model, batch), batch)


def _shown(ratios: LogRatios, two: Pairs) -> dict[str, Tensor]:
    """The metrics of each pair, [P]."""
    policy_C = ratios.policy_C.detach()
    log_ratio_C = policy_C - ratios.reference_C
    margin_P = ratios.reward_C[two.chosen_P] - ratios.reward_C[two.rejected_P]
    return {
        "reward_chosen": ratios.reward_C[two.chosen_P],
        "reward_rejected": ratios.reward_C[two.rejected_P],
        "margin": margin_P,
        "accuracy": (margin_P.sign() + 1) / 2,
        "logp_chosen": policy_C[two.chosen_P],
        "logp_rejected": policy_C[two.rejected_P],
        "kl": (log_ratio_C[two.chosen_P] + log_ratio_C[two.rejected_P]) / 2,
    }


def _per_continuation(values_N: Tensor, batch: PackedBatch) -> Tensor:
    """Sums over the tokens of each continuation, [C].

    In float64 where the device has it: sums of thousands of nats are then subtracted from each other,
    and policy and reference must agree to the last bit that matters at the first step.
    """
    wide = torch.float32 if values_N.device.type == "mps" else torch.float64
    return values_N.new_zeros(batch.continuations, dtype=wide).index_add(0, batch.owner_N, values_N.to(wide))
