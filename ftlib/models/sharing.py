"""A second model around the same base weights: several roles, one base in memory.

The frozen base under an adapter never changes, so another model may compute with the very same tensors:
a reward model with its own adapter and score head, a critic with its own. Each is an ordinary model, with
nothing to switch between a forward and its backward.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ftlib.adapters.quantised import adopt_quantisation, quantised_layers
from ftlib.adapters.shared import mark_shared
from ftlib.errors import CapabilityError
from ftlib.models.adapted import tuner_layers, why_not_off
from ftlib.models.parts import inner_model

__all__ = ["on_same_base", "shared_with"]


def on_same_base(model: nn.Module) -> PreTrainedModel:
    """A plain model of the same class whose weights are the frozen base weights of `model`, not copies.

    Put an adapter on it before training, one that leaves the base as it is: what trains a weight of the base
    trains it for both. Random generators are left alone.

    Args:
        model: with adapters that leave their base as it is.

    Returns:
        The base, in evaluation mode, with the configuration of `model`.

    Raises:
        CapabilityError: no adapter, or a base that is trained, changed by it or merged with it.
    """
    reason = _why_not(model)
    if reason is not None:
        raise CapabilityError(
            f"on_same_base: expected a model whose base stays as it is under an adapter, got one that does "
            f"not: {reason}. Give the role a model of its own."
        )
    inner = inner_model(model)
    with torch.device("meta"):
        twin = type(inner)(inner.config)
    _adopt(twin, inner, "", {module for _, module in quantised_layers(inner)})
    adopt_quantisation(twin, inner)
    twin.name_or_path = inner.name_or_path
    mark_shared(twin)
    return cast(PreTrainedModel, twin.eval())


def shared_with(model: nn.Module, other: nn.Module) -> list[str]:
    """The weights of a model that another one trains too, by name."""
    trained = {id(weight) for weight in other.parameters() if weight.requires_grad}
    return [name for name, weight in model.named_parameters() if id(weight) in trained]


def _why_not(model: nn.Module) -> str | None:
    if isinstance(model, PeftModel):
        merged = sorted({name for layer in tuner_layers(model) for name in layer.merged_adapters})
        if merged:
            return f"it is merged with {merged}"
    return why_not_off(model)


def _adopt(twin: nn.Module, own: Any, where: str, quantised: Container[nn.Module]) -> None:
    """Put the tensors of the base into a model that has none; peft keeps an adapted module one level down."""
    names = [set(module._parameters) | set(module._buffers) | set(module._modules) for module in (twin, own)]
    if type(twin) is not type(own) or names[0] != names[1]:
        raise CapabilityError(
            f"on_same_base: expected the module {where!r} as {type(twin).__name__}, as its configuration "
            f"makes it, got {type(own).__name__}. Give the role a model of its own."
        )
    twin._parameters.update(own._parameters)
    twin._buffers.update(own._buffers)
    for name, child in own._modules.items():
        if child is None:
            continue
        part = _unwrapped(child)
        if part in quantised:  # it keeps its weight in a form of its own
            twin._modules[name] = part
        else:
            _adopt(cast(nn.Module, twin._modules[name]), part, f"{where}.{name}".lstrip("."), quantised)


def _unwrapped(own: Any) -> Any:
    """A module without what peft put around it."""
    while isinstance(own, BaseTunerLayer | AuxiliaryTrainingWrapper):
        own = own.get_base_layer() if isinstance(own, BaseTunerLayer) else own.original_module
    return own
