"""Roles on one model: scopes that run it with its adapters off, with others active, or with other weights.

What a scope changes comes back when it ends, after an exception too: the active adapters, whether they are
on, the mode of every module, `requires_grad` of every weight. The switches are set on peft's layers
themselves, since peft's own methods rewrite `requires_grad` along with them, and a weight that is frozen
between a forward and its backward silently gets no gradient.

A backward belongs into the scope of its forward: checkpointed layers are computed again there, and would
be with another role. Scopes act on the model, so one thread at a time may run it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from peft import PeftModel
from peft.helpers import DoraCaching
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftlib.errors import CapabilityError, ShapeError
from ftlib.models.adapted import names_in, tuner_layers, virtual_holders

__all__ = ["adapters_active", "adapters_off", "restored", "swapped_weights"]

CALLS = ("forward", "prepare_inputs_for_generation")  # where peft adds virtual tokens to a call of the model


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Adapters, modes and `requires_grad` after the scope are those before it, whatever happens inside."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    weights = [weight for module in modules for weight in module._parameters.values() if weight is not None]
    trained = [weight.requires_grad for weight in weights]
    switches = [(module, name, getattr(module, name)) for module in modules for name in _switches_of(module)]
    calls = [(holder, name, vars(holder).get(name)) for holder in virtual_holders(model) for name in CALLS]
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            if module.training != mode:
                module.training = mode
        for weight, flag in zip(weights, trained, strict=True):
            if weight.requires_grad != flag:
                weight.requires_grad = flag
        for module, name, value in switches:
            setattr(module, name, value)
        for holder, name, call in calls:
            vars(holder).pop(name, None)
            if call is not None:
                vars(holder)[name] = call


def _switches_of(module: nn.Module) -> tuple[str, ...]:
    """The attributes of peft that say which adapters of a module act."""
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        return "_active_adapter", "_disable_adapters"
    if isinstance(module, PeftModel):
        return "active_adapter", "_adapters_disabled"
    return ("active_adapter",) if isinstance(module, BaseTuner) else ()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run the model without its adapters, of whatever name; a plain model runs as it is.

    That is the base, bit for bit, where the adapter's capability `off_is_base` says so.

    Raises:
        CapabilityError: an adapter is merged into the base.
    """
    layers = _unmerged(model)
    with restored(model):
        for layer in layers:
            layer._disable_adapters = True
        for module in _holders(model):
            module._adapters_disabled = True
        for holder in virtual_holders(model):  # as peft does, whose own scope fails on score heads
            base = holder.get_base_model()
            own = CALLS if cast(PreTrainedModel, base).can_generate() else CALLS[:1]
            vars(holder).update({name: getattr(base, name) for name in own})
        yield


@contextmanager
def adapters_active(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Run the model with exactly these adapters, also where they were off; no names, none.

    Raises:
        CapabilityError: the model has no adapter of that name, or one is merged into the base.
    """
    layers = _unmerged(model)
    virtual = list(virtual_holders(model))
    known = {name for layer in layers for name in layer._get_available_adapters()}
    known.update(name for holder in virtual for name in holder.peft_config)
    if not known.issuperset(names):
        raise CapabilityError(
            f"adapters_active: expected adapters of the model, {sorted(known)}, got {list(names)}."
        )
    with restored(model):
        for layer in layers:
            layer._active_adapter = names_in(layer, names)
            layer._disable_adapters = False
        for module in _holders(model):
            module._adapters_disabled = module in virtual and not names
            if names:  # as peft keeps them: the first, and all
                module.active_adapter = names[0]
                if module not in virtual:
                    module.base_model.active_adapter = list(names)
        for holder in virtual:
            for call in CALLS:
                vars(holder).pop(call, None)
        yield


def _holders(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, PeftModel))


@contextmanager
def swapped_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the model with other weights in the place of its own, which are neither copied nor touched.

    The weights given are frozen in the scope, so no gradient reaches them, nor the model's own.

    Args:
        model: plain or with adapters.
        weights: name, as in `model.named_parameters()`, to a tensor of the same shape, device and dtype.
            A tied weight is named once, by any of its names.

    Raises:
        ShapeError: a name that the model does not have, or another shape.
        CapabilityError: weights that are sharded or of a special kind, or an adapter that is merged.
    """
    _unmerged(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in weights.items():
        _require_swappable(name, named.get(name), tensor)
    # frozen, and objects of their own: autocast would keep casts of weights that require gradients, by object
    frozen = {
        id(named[name]): nn.Parameter(tensor.detach(), requires_grad=False)
        for name, tensor in weights.items()
    }
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in frozen
    ]
    # peft may keep norms of DoRA's weights from one forward to the next
    with restored(model), DoraCaching(enabled=False):
        try:
            for module, name, parameter in places:
                setattr(module, name, frozen[id(parameter)])
            yield
        finally:
            for module, name, parameter in places:
                setattr(module, name, parameter)


def _require_swappable(name: str, own: nn.Parameter | None, tensor: Tensor) -> None:
    if own is None or own.shape != tensor.shape:
        found = "none of that name" if own is None else f"{tuple(own.shape)} in the model"
        raise ShapeError(
            f"swapped_weights: expected weights of the model, got {name!r} {tuple(tensor.shape)}: {found}. "
            "Take names and shapes from model.named_parameters()."
        )
    if type(own.data) is not Tensor:
        raise CapabilityError(
            f"swapped_weights: expected plain tensors, got {type(own.data).__name__} for {name!r}: a sharded "
            "weight is put in place by its wrapper. Take a copy of the model before it is sharded."
        )


def _unmerged(model: nn.Module) -> list[Any]:
    """The layers of the model's adapters, none of which is merged."""
    layers = list(tuner_layers(model))
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise CapabilityError(
            f"roles: expected adapters beside their base, got {merged} merged into it, where they can be "
            "neither switched nor swapped. Call model.unmerge_adapter() first."
        )
    return layers
