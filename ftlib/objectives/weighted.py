"""A sum of objectives, each with its coefficient and its own denominator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TypeVar, final

from torch import Tensor, nn

from ftlib.batches import LossOutput, Mean, PackedBatch
from ftlib.errors import ConfigError
from ftlib.models import forward
from ftlib.objectives.protocol import Objective, OfOneForward, Prepared, Referring

__all__ = ["Weighted", "weighted"]

Value = TypeVar("Value")


def weighted(objectives: Mapping[Objective, float]) -> Weighted:
    """Several objectives as one: ``loss = sum of coefficient * loss of the objective``.

    Members that offer `of` share one forward. A term is named "weighted_" and its member's name for it,
    and holds the coefficient; the plain mean is a metric under the member's name. Where two members use
    one name, the later carries its place: "dpo", "dpo_2".

    Args:
        objectives: objective -> its coefficient, finite; at least one.

    Raises:
        ConfigError: no objective, a coefficient that is not finite, something that is no objective, or
            members that read scores beside members that read log-probabilities.

    Example:
        >>> import torch
        >>> from ftlib.batches import Group
        >>> from ftlib.data import collate
        >>> from ftlib.objectives import DPO, SFT
        >>> answers = torch.tensor([6, 7]), torch.tensor([8, 9])
        >>> pair = Group(torch.tensor([5]), torch.zeros(1), answers, (torch.ones(2), torch.ones(2)))
        >>> weighted({DPO(): 1.0, SFT(): 0.1}).counts(collate([pair]))  # one pair, two chosen tokens
        {'weighted_dpo': tensor(1.), 'weighted_nll': tensor(2.)}
    """
    if not isinstance(objectives, Mapping):
        raise ConfigError(
            "objectives.weighted: expected a dict of objectives with their coefficients, got "
            f"{objectives!r:.80}."
        )
    return Weighted(tuple(objectives.items()))


@final
@dataclass(frozen=True)
class Weighted:
    """What `weighted` makes: members with their coefficients, in order."""

    members: tuple[tuple[Objective, float], ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise ConfigError("objectives.weighted: expected at least one objective, got none.")
        for member, coefficient in self.members:
            candidate: object = member
            if isinstance(candidate, type) or not isinstance(candidate, Objective):
                raise ConfigError(
                    f"objectives.weighted: expected objectives such as SFT(), got {candidate!r}."
                )
            if not math.isfinite(coefficient):
                raise ConfigError(
                    f"objectives.weighted: expected a finite coefficient of {member!r}, got {coefficient}."
                )
        kinds = {member.needs.scores for member, _ in self.members if isinstance(member, OfOneForward)}
        if len(kinds) > 1:
            raise ConfigError(
                "objectives.weighted: expected members that read scores, or members that read "
                f"log-probabilities, got both in {[member for member, _ in self.members]}. A model has "
                "one head: train two models."
            )

    def bound(self, model: nn.Module, *, cache: bool | str | Path = True) -> Weighted:
        """With the references that members ask for, made from the weights `model` has now."""
        made = [
            (member.bound(model, cache=cache) if isinstance(member, Referring) else member, coefficient)
            for member, coefficient in self.members
        ]
        return Weighted(tuple(made))

    def counts(self, batch: PackedBatch) -> Mapping[str, Tensor]:
        """The counts of all members."""
        return _merged(_as_terms(member.counts(batch)) for member, _ in self.members)

    def __call__(self, model: nn.Module, batch: PackedBatch) -> LossOutput:
        """Terms and metrics of all members."""
        # 1. other roles, before any forward whose backward is still to come
        batches = [
            member.prepare(batch) if isinstance(member, Prepared) else batch for member, _ in self.members
        ]
        # 2. members with a forward of their own, then one forward for the rest
        outputs = {
            place: member(model, batch)
            for place, (member, _) in enumerate(self.members)
            if not isinstance(member, OfOneForward)
        }
        sharing = {
            place: member
            for place, (member, _) in enumerate(self.members)
            if isinstance(member, OfOneForward)
        }
        if sharing:
            needs = reduce(or_, (member.needs for member in sharing.values()))
            scored = forward(model, batch, **asdict(needs))
            outputs |= {place: member.of(scored, batches[place]) for place, member in sharing.items()}
        # 3. one output
        weighed = [(outputs[place], coefficient) for place, (_, coefficient) in enumerate(self.members)]
        return LossOutput(
            _merged(
                _as_terms({name: Mean(c * mean.sum, mean.count) for name, mean in output.terms.items()})
                for output, c in weighed
            ),
            _merged(
                {name: mean.detach() for name, mean in output.terms.items()} | dict(output.metrics)
                for output, _ in weighed
            ),
        )


def _as_terms(values: Mapping[str, Value]) -> dict[str, Value]:
    return {f"weighted_{name}": value for name, value in values.items()}


def _merged(members: Iterable[Mapping[str, Value]]) -> dict[str, Value]:
    """One mapping; a name that is taken carries the place of its member."""
    merged: dict[str, Value] = {}
    for place, values in enumerate(members, start=1):
        merged |= {f"{name}_{place}" if name in merged else name: value for name, value in values.items()}
    return merged
