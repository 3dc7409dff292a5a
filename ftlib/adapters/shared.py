"""Models whose base another model computes with too: nothing may write into it."""

from __future__ import annotations

from weakref import WeakSet

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel

from ftlib.adapters.initial import changes_base
from ftlib.errors import CapabilityError

__all__ = ["mark_shared", "require_unshared"]

_shared: WeakSet[nn.Module] = WeakSet()  # bodies, which a new head is put on


def mark_shared(model: PreTrainedModel) -> None:
    """Note that the weights of a model are those of another one."""
    _shared.add(model.base_model)


def require_unshared(model: nn.Module, config: PeftConfig | None) -> None:
    """Raise `CapabilityError` for an adapter that would write into a base which another model has too.

    Args:
        model: to attach it to.
        config: of the adapter; None trains every weight.
    """
    writes = config is None or changes_base(config)
    if writes and isinstance(model, PreTrainedModel) and model.base_model in _shared:
        what = "full fine-tuning" if config is None else "an initialisation that is taken out of the base"
        raise CapabilityError(
            f"attach: expected an adapter with off_is_base on a base that another model shares, got {what}, "
            "which would change that model too. Take ftlib.adapters.lora(), or give the role a model of "
            "its own."
        )
