"""What sets the strength `beta` of the KL penalty from one rollout to the next.

A controller has `beta`, `update(kl_per_sequence, sequences)` after each rollout, and a state to resume
from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from ftlib.errors import ConfigError, NonFiniteError

__all__ = ["AdaptiveKL", "FixedKL"]

_MAX_ERROR = 0.2  # one rollout moves beta by at most this share of sequences / horizon


@final
@dataclass(frozen=True)
class FixedKL:
    """The same strength all along.

    Args:
        kl_coef: beta, >= 0; score units per nat.

    Raises:
        ConfigError: a coefficient that is negative or not finite.
    """

    kl_coef: float

    def __post_init__(self) -> None:
        if not 0 <= self.kl_coef < math.inf:
            raise ConfigError(f"FixedKL: expected a finite kl_coef >= 0, got {self.kl_coef}.")

    @property
    def beta(self) -> float:
        """Strength of the penalty for the next rollout."""
        return self.kl_coef

    def update(self, kl_per_sequence: float, sequences: int) -> None:
        """Nothing: what was measured does not move a fixed strength."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: the coefficient is a setting, and a changed setting counts from then on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Nothing to restore."""


@final
@dataclass(eq=False)
class AdaptiveKL:
    """Moves the strength until the KL of a sequence is at its target.

        beta <- beta * (1 + clip(K / target - 1, -0.2, 0.2) * N / horizon)

    Args:
        kl_coef: beta of the first rollout, > 0; score units per nat.
        kl_target: KL to settle at, > 0, in nats per *sequence*. A mean per token is smaller by the
            length of the completion and would let the policy go that much further.
        kl_horizon: > 0, in sequences; the larger, the slower.

    Raises:
        ConfigError: an argument that is not finite and positive.

    Source: Ziegler et al. 2019, section 2.2.

    Example:
        >>> controller = AdaptiveKL(0.15, kl_target=6.0, kl_horizon=10_000)
        >>> controller.update(kl_per_sequence=9.0, sequences=512)
        >>> round(controller.beta, 6)
        0.151536
    """

    kl_coef: float
    kl_target: float
    kl_horizon: float
    beta: float = field(init=False)

    def __post_init__(self) -> None:
        for name in ("kl_coef", "kl_target", "kl_horizon"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"AdaptiveKL: expected a finite {name} > 0, got {value}.")
        self.beta = self.kl_coef

    def update(self, kl_per_sequence: float, sequences: int) -> None:
        """Move `beta`, once per rollout.

        Args:
            kl_per_sequence: K, log-ratios summed over the sampled tokens of a sequence, averaged over
                the sequences of all ranks; nats. Slightly negative values occur, being estimates.
            sequences: N, how many these were.

        Raises:
            NonFiniteError: a KL that is NaN or infinite; `beta` was not touched.
            ConfigError: so many sequences for the horizon that `beta` could turn negative.
        """
        if not math.isfinite(kl_per_sequence):
            raise NonFiniteError(
                f"AdaptiveKL.update: expected a finite kl_per_sequence, got {kl_per_sequence}. Look at the "
                "log-probabilities of the rollout."
            )
        if not 0 <= sequences * _MAX_ERROR < self.kl_horizon:
            raise ConfigError(
                f"AdaptiveKL.update: expected 0 to {self.kl_horizon / _MAX_ERROR:g} sequences for a horizon "
                f"of {self.kl_horizon:g}, got {sequences}. Raise kl_horizon."
            )
        error = min(max(kl_per_sequence / self.kl_target - 1, -_MAX_ERROR), _MAX_ERROR)
        self.beta *= 1 + error * sequences / self.kl_horizon

    def state_dict(self) -> dict[str, Any]:
        """`beta` as it is now; the arguments are settings."""
        return {"beta": self.beta}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Continue from the `beta` of `state_dict`."""
        self.beta = float(state["beta"])
