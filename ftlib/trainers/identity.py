"""What must be the same for a run to go on from a checkpoint, and what may differ with a warning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ftlib.adapters.attach import AnyModel
from ftlib.engine.engine import Engine
from ftlib.engine.manifest import versions
from ftlib.models import fingerprints
from ftlib.models.adapted import idle_weights
from ftlib.models.fingerprints import hash_tensors
from ftlib.models.references import Cached, FrozenCopy
from ftlib.trainers.fingerprint import data_fingerprint
from ftlib.trainers.snapshot import Stateful

__all__ = ["adapter_settings", "identity", "machine", "plain", "weights_fingerprint"]


def identity(engine: Engine, model: AnyModel, data: Dataset | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What must be the same for a run to go on: settings, data, adapter and frozen weights.

    Args:
        engine: with its settings and objective.
        model: the one it trains.
        data: encoded examples.
    """
    return {
        **engine.config.identity(),
        "learning_rate": engine.learning_rate,
        "objective": plain(engine.objective),
        "adapter": adapter_settings(model),
        "data": data_fingerprint(data),
        "base_weights": weights_fingerprint(model),
    }


def weights_fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over the frozen weights that are read, by name.

    Under an adapter with a score head of its own, the head of its base, drawn anew in every process, is not.
    """
    idle = idle_weights(model)
    return hash_tensors(
        (name, weight)
        for name, weight in model.named_parameters()
        if not weight.requires_grad and id(weight) not in idle
    )


def adapter_settings(model: AnyModel) -> dict[str, Any] | None:
    """The active adapter's configuration as plain values; None for a model without one."""
    if isinstance(model, PreTrainedModel):
        return None
    settings: dict[str, Any] = plain(fingerprints.adapter_settings(model, str(model.active_adapter)))
    return settings


def plain(value: Any) -> Any:
    """A setting as JSON holds it, the same in every process: functions and objects by name, sets sorted.

    Fields that a `Stateful` object keeps in its state are no settings, nor are the weights of a reference; a
    model given as one is not in the state, and known by its weights.
    """
    if value is None or (isinstance(value, bool | int | float | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Cached):
        return {"type": "Cached", "reference": plain(value.reference)}
    if isinstance(value, FrozenCopy) and not value.state_dict():
        return {"type": "FrozenCopy", "weights": value.fingerprint()}
    if is_dataclass(value) and not isinstance(value, type):
        state = value.state_dict() if isinstance(value, Stateful) else {}
        names = [field.name for field in fields(value) if field.name not in state]
        named = {name: plain(getattr(value, name)) for name in names}
        return {"type": type(value).__qualname__, **named}
    return getattr(value, "__qualname__", type(value).__qualname__)


def machine(engine: Engine) -> dict[str, Any]:
    """Versions and hardware: where these differ, a resumed run is right but not bit for bit the same."""
    dtypes = sorted({str(weight.dtype) for weight in engine.model.parameters()})
    return {
        "device": engine.device.type,
        "dtypes": dtypes,
        "ranks": engine.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        **versions(),
    }
