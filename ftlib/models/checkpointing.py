"""Activation checkpointing under grouped attention: a layer is recomputed as it was computed.

A checkpointed layer runs again in the backward, when the forward has long given the model its own
attention back, and would then attend across documents. So while a grouped forward runs, every function
that recomputes a layer gets that layer inside a grouped scope of its own. Which function that is stays
the user's choice: transformers' or torch's wrapper, reentrant or not, offloaded, every n-th layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import PreTrainedConfig, PreTrainedModel

from ftlib.adapters.attach import model_capabilities
from ftlib.errors import CapabilityError
from ftlib.models.attention import grouped_scope
from ftlib.models.parts import inner_model

__all__ = [
    "disable_checkpointing",
    "enable_checkpointing",
    "grouped_recompute",
    "is_checkpointable",
    "require_checkpointable",
]


def enable_checkpointing(model: nn.Module, *, every_n_layers: int = 1) -> None:
    """Keep the inputs of layers instead of their activations, and recompute these in the backward.

    The embedding's output is made to require gradients, which some layers need where the base is frozen.

    Args:
        model: a causal language model of transformers, plain or with adapters; acts in training mode.
        every_n_layers: 1 checkpoints every layer, 2 every second one, and so on.

    Raises:
        CapabilityError: the model declares that it cannot, or its adapter does.
    """
    require_checkpointable(model)
    inner = inner_model(model)
    if not inner.supports_gradient_checkpointing:
        raise CapabilityError(
            f"enable_checkpointing: expected a model that supports activation checkpointing, got "
            f"{type(inner).__name__}, which declares that it does not. Lower max_tokens instead."
        )
    inner.disable_input_require_grads()  # a second call would otherwise leave the first one's hooks behind
    inner.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every_n_layers)


def require_checkpointable(model: nn.Module) -> None:
    """Raise `CapabilityError` for an adapter that lives in the cache, which recomputed layers do not have."""
    if not is_checkpointable(model):
        raise CapabilityError(
            "gradient_checkpointing: expected an adapter that declares checkpointable, got one whose keys "
            "and values lie in the cache, which is dropped where layers are recomputed. Lower max_tokens "
            "instead, or take ftlib.adapters.prompt() or lora()."
        )


def is_checkpointable(model: nn.Module) -> bool:
    """Whether the active adapter works where layers are recomputed."""
    return not isinstance(model, PeftModel) or model_capabilities(model).checkpointable


def disable_checkpointing(model: nn.Module) -> None:
    """Keep all activations again; undoes `enable_checkpointing`."""
    inner = inner_model(model)
    inner.activation_checkpointing_disable()
    inner.disable_input_require_grads()


@contextmanager
def grouped_recompute(body: PreTrainedModel) -> Iterator[None]:
    """While a grouped forward of `body` runs, let its checkpointed layers be recomputed grouped too."""
    before = list(_recomputing(body)) if torch.is_grad_enabled() else []
    for module, name, function in before:
        setattr(module, name, _grouped(function, body.config))
    try:
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def _recomputing(body: PreTrainedModel) -> Iterator[tuple[nn.Module, str, Callable[..., Any]]]:
    """Every module that recomputes, the attribute that holds its checkpoint function, and that function."""
    module: Any
    for module in body.modules():
        if isinstance(module, CheckpointWrapper):
            yield module, "checkpoint_fn", module.checkpoint_fn
        elif getattr(module, "gradient_checkpointing", False):  # transformers' own flag, on layers and models
            yield module, "_gradient_checkpointing_func", module._gradient_checkpointing_func


def _grouped(checkpoint: Callable[..., Any], config: PreTrainedConfig) -> Callable[..., Any]:
    def checkpoint_grouped(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        def run(*inputs: Any, **options: Any) -> Any:
            with grouped_scope(config):
                return function(*inputs, **options)

        return checkpoint(run, *inputs, **options)

    return checkpoint_grouped
