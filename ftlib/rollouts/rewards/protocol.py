"""What a reward is: prompts and completions in, one item per row out.

Shapes: L tokens of one completion.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, final

from torch import Tensor

__all__ = ["Item", "Reward", "RewardOut"]


@final
@dataclass(frozen=True, eq=False)
class RewardOut:
    """What one completion is worth, with its parts.

    Args:
        score: of the whole completion; None where only tokens are rewarded.
        token_rewards: float [L], one per token; None for none.
        info: further numbers, logged by name: the members of an ensemble, say.
    """

    score: float | None = None
    token_rewards: Tensor | None = None
    info: Mapping[str, float] = field(default_factory=dict)


Item = float | Tensor | RewardOut | None
"""A score, token rewards [L], both, or None: there is no reward for this row, so it is left out."""


class Reward(Protocol):
    """A function, plain or ``async``, that values completions.

    ``prompts`` and ``completions`` are in the form the prompts came in, strings or message lists. The
    columns are those of the data set, and ``prompt_ids``, ``completion_ids`` and ``finished`` of each
    row. The reward functions of trl fit.
    """

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Sequence[Item] | Awaitable[Sequence[Item]]:
        """One item per row."""
