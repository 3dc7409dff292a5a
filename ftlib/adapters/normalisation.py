"""Mean and deviation that put the scores of a reward model on a scale of their own.

    score = (head's score - mean) / std

They belong to the trained weights: to an adapter, in a file beside its own, or to a whole model, in its
config. The head itself is not changed, so losses and plain transformers see its own scores.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from peft import PeftModel
from torch import nn

from ftlib.adapters.vetting import read_json
from ftlib.errors import ConfigError

__all__ = [
    "SIDECAR",
    "Normalisation",
    "normalisation_of",
    "read_normalisation",
    "set_normalisation",
    "write_normalisation",
]

_KEY = "score_normalisation"
SIDECAR = f"{_KEY}.json"  # beside an adapter's own files


@final
@dataclass(frozen=True)
class Normalisation:
    """What is taken from a score, and what it is then divided by.

    Args:
        mean: in units of the head's scores.
        std: likewise, > 0.

    Raises:
        ConfigError: not finite, or no deviation.
    """

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0.0 < self.std < math.inf):
            raise ConfigError(f"normalisation: expected a finite mean and std > 0, got {self}.")

    def __call__(self, score: float) -> float:
        """The score on the scale."""
        return (score - self.mean) / self.std


def normalisation_of(model: nn.Module) -> Normalisation | None:
    """That of the active adapter, or of a model without one; None where nothing was fitted.

    Raises:
        ConfigError: the model's config does not hold two such numbers.
    """
    held = vars(_holder(model)).get(_KEY)
    return None if held is None else _parsed(held, "config.json")


def set_normalisation(model: nn.Module, value: Normalisation | None) -> None:
    """Give it to the active adapter, or to a model without one; None takes it away."""
    held = vars(_holder(model))
    held.pop(_KEY, None)
    if value is not None:
        held[_KEY] = asdict(value)


def write_normalisation(folder: Path, model: PeftModel) -> None:
    """Write the sidecar of the active adapter, if it has one."""
    value = normalisation_of(model)
    if value is not None:
        (folder / SIDECAR).write_text(json.dumps(asdict(value), indent=2) + "\n", encoding="utf-8")


def read_normalisation(folder: Path) -> Normalisation | None:
    """That of a saved adapter; None where its folder holds none.

    Raises:
        ConfigError: a file that does not hold two such numbers.
    """
    path = folder / SIDECAR
    return _parsed(read_json(path), str(path)) if path.is_file() else None


def _parsed(held: Any, where: str) -> Normalisation:
    try:
        return Normalisation(mean=float(held["mean"]), std=float(held["std"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f'{where}: {_KEY}: expected {{"mean": number, "std": number > 0}}, got {held!r:.80}. Take it out '
            "and fit it again."
        ) from error


def _holder(model: nn.Module) -> Any:
    """Whose configuration says it: peft writes no fields that it does not know, transformers writes all."""
    return model.active_peft_config if isinstance(model, PeftModel) else model.config
