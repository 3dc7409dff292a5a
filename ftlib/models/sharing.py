"""A second model around the same base weights: several roles, one base in memory.

The frozen base under an adapter never changes, so another model may compute with the very same tensors:
a reward model with its own adapter and score head, a critic with its own. Each is an ordinary model, with
nothing to switch between a forward and its backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftlib.errors import CapabilityError
from ftlib.models.adapted import why_not_off
from ftlib.models.parts import inner_model

__all__ = ["on_same_base"]


def on_same_base(model: nn.Module) -> PreTrainedModel:
    """A plain model of the same class whose weights are the frozen base weights of `model`, not copies.

    Args:
        model: with adapters that leave their base as it is.

    Raises:
        CapabilityError: no adapter, or a base that is trained or changed by it.
    """
    reason = why_not_off(model)
    if reason is not None or not isinstance(model, PeftModel):
        raise CapabilityError(
            f"on_same_base: expected a model whose base stays as it is under an adapter, got one that does "
            f"not: {reason}. Give the role a model of its own."
        )
    inner = inner_model(model)
    with torch.device("meta"):
        twin = type(inner)(inner.config)
    nn.Module.to(twin, inner.dtype)
    parameters = _base_tensors(
        inner.named_parameters(remove_duplicate=False)
    )  # tied ones under all their names
    _adopt(twin, parameters, _base_tensors(inner.named_buffers(remove_duplicate=False)))
    twin.name_or_path = inner.name_or_path
    return cast(PreTrainedModel, twin.eval())


def _base_tensors(named: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by the names they have in a plain model: peft moves a layer it adapts one level down."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor for name, tensor in named
    }


def _adopt(twin: PreTrainedModel, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    for prefix, module in twin.named_modules():
        where = f"{prefix}." if prefix else ""
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                module._parameters[name] = cast(nn.Parameter, _found(where + name, parameters))
        for name in list(module._buffers):
            if module._buffers[name] is not None:
                module._buffers[name] = _found(where + name, buffers)
    twin.tie_weights()


def _found(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if name not in tensors:
        raise CapabilityError(
            f"on_same_base: expected a base weight {name!r}, got none under the adapter. "
            "Give the role a model of its own."
        )
    return tensors[name]
