"""Evaluation mode, and training mode without dropout, as scopes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluation_mode", "no_dropout"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the scope; every module's own mode comes back after it."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def no_dropout(model: nn.Module) -> Iterator[None]:
    """No dropout for the scope, in training mode too: activation checkpointing acts in that mode only.

    Layers of torch keep their share in `p`, attention layers of transformers in an attribute such as
    ``attention_dropout``, which they hand to the attention function.
    """
    shares = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and 0 < value <= 1 and (_is_dropout(module, name) or "drop" in name)
    ]
    for module, name, _ in shares:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in shares:
            setattr(module, name, value)


def _is_dropout(module: nn.Module, name: str) -> bool:
    return name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)
