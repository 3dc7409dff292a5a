"""Facts about the adapters in a model: which are active, which weights are in use, what they change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ftlib.adapters.attach import model_capabilities
from ftlib.errors import CapabilityError

__all__ = [
    "active_adapters",
    "idle_weights",
    "is_identity",
    "names_in",
    "own_rates",
    "parameters_in_use",
    "tuner_layers",
    "undecayed",
    "virtual_holders",
    "why_not_off",
]


def tuner_layers(model: nn.Module) -> Iterator[Any]:
    """Modules of peft around the model's own: adapted layers, and those trained whole beside an adapter."""
    return (each for each in model.modules() if isinstance(each, BaseTunerLayer | AuxiliaryTrainingWrapper))


def virtual_holders(model: nn.Module) -> Iterator[PeftModel]:
    """The modules of peft that put virtual tokens before the text."""
    for module in model.modules():
        if isinstance(module, PeftModel) and module.active_peft_config.is_prompt_learning:
            yield module


def names_in(layer: Any, names: Sequence[str]) -> list[str]:
    """Those of the adapters `names` that a layer has, in that order."""
    present = layer._get_available_adapters()
    return [name for name in names if name in present]


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """The adapters that take part in a forward now; none of a plain model, or where they are switched off.

    Raises:
        CapabilityError: layers disagree, so that no list of names says what the model computes.
    """
    states = [
        (layer, [] if layer.disable_adapters else names_in(layer, layer.active_adapters))
        for layer in tuner_layers(model)
    ]
    virtual = [str(each.active_adapter) for each in virtual_holders(model) if not each._adapters_disabled]
    found = tuple(dict.fromkeys([*virtual, *(name for _, names in states for name in names)]))
    for layer, names in states:
        if names != names_in(layer, found):
            raise CapabilityError(
                f"adapters: expected the same active adapters in every layer, got {names} in one of "
                f"{names_in(layer, found)}. Set them with model.set_adapter(name)."
            )
    return found


def parameters_in_use(model: nn.Module, adapters: Sequence[str]) -> dict[str, nn.Parameter]:
    """The weights that a forward reads while exactly these adapters are active, by name; tied ones once.

    Where an adapter trains a module whole, the module it stands in for is listed too.
    """
    used: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in _walk(model, "", adapters):
        used.setdefault(id(parameter), (name, parameter))
    return dict(used.values())


def _walk(module: nn.Module, prefix: str, adapters: Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """In the order of `named_parameters`."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter
    keyed = _keyed_by_adapter(module)
    for name, child in module._modules.items():
        if child is None:
            continue
        if name in keyed and isinstance(child, nn.ModuleDict | nn.ParameterDict):
            for adapter, part in child.items():
                if adapter not in adapters:
                    continue
                where = f"{prefix}{name}.{adapter}"
                yield from _walk_part(part, where, adapters)
        else:
            yield from _walk(child, f"{prefix}{name}.", adapters)


def _keyed_by_adapter(module: nn.Module) -> Sequence[str]:
    """Names of the children that hold one part for each adapter."""
    if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        return cast(Sequence[str], module.adapter_layer_names)
    return ("prompt_encoder",) if isinstance(module, PeftModel) else ()


def _walk_part(
    part: nn.Module | nn.Parameter, where: str, adapters: Sequence[str]
) -> Iterator[tuple[str, nn.Parameter]]:
    if isinstance(part, nn.Parameter):
        yield where, part
    else:
        yield from _walk(part, f"{where}.", adapters)


def idle_weights(model: nn.Module) -> frozenset[int]:
    """`id`s of the weights that nothing reads: of modules that the active adapters train whole, as copies."""
    replaced = tuple(
        f"{name}.original_module."
        for name, layer in model.named_modules()
        if isinstance(layer, ModulesToSaveWrapper)
        and not layer.disable_adapters
        and names_in(layer, layer.active_adapters)
    )
    named = list(model.named_parameters(remove_duplicate=False))
    idle = frozenset(id(weight) for name, weight in named if name.startswith(replaced))
    return idle - {id(weight) for name, weight in named if not name.startswith(replaced)}


def undecayed(model: nn.Module) -> frozenset[str]:
    """Names of the weights that a pull towards zero would spoil: scales, which start at one, virtual tokens,
    and what computes those.
    """
    own: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, IA3Layer):
            own += module.ia3_l.values()
    for holder in virtual_holders(model):
        own += _virtual_weights(holder)
    return frozenset(_names(model, own))


def own_rates(model: nn.Module) -> dict[str, float]:
    """Default peaks of weights that have one of their own, by name: of the virtual tokens in a stack."""
    rates: dict[str, float] = {}
    for holder in virtual_holders(model):
        rate = model_capabilities(holder).virtual_rate
        if rate is not None:
            rates |= dict.fromkeys(_names(model, _virtual_weights(holder)), rate)
    return rates


def _virtual_weights(holder: PeftModel) -> Iterator[nn.Parameter]:
    return cast(nn.Module, holder.prompt_encoder).parameters()


def _names(model: nn.Module, weights: Iterable[nn.Parameter]) -> list[str]:
    chosen = {id(weight) for weight in weights}
    return [name for name, weight in model.named_parameters() if id(weight) in chosen]


def is_identity(model: nn.Module) -> bool:
    """Whether the active adapters leave the base's outputs as they are, seen from their weights.

    True is a proof; False may also mean that nothing is known of this kind of adapter. Virtual tokens always
    change them: even keys of zeros take a share of the attention.
    """
    return not any(not each._adapters_disabled for each in virtual_holders(model)) and all(
        _layer_is_identity(layer, name)
        for layer in tuner_layers(model)
        if not layer.disable_adapters
        for name in names_in(layer, layer.active_adapters)
    )


def _layer_is_identity(layer: Any, name: str) -> bool:
    if isinstance(layer, LoraLayer):  # y = W x + s B A x, unless a variant changes the formula
        pairs: list[tuple[Any, Any]] = [
            (layer.lora_A, layer.lora_B),
            (layer.lora_embedding_A, layer.lora_embedding_B),
        ]
        biased = any(getattr(b[name], "bias", None) is not None for _, b in pairs if name in b)
        vanishes = any(_is_zero(part[name]) for pair in pairs for part in pair if name in part)
        return vanishes and not biased and name not in layer.lora_variant
    if isinstance(layer, IA3Layer):  # a product
        return bool((layer.ia3_l[name] == 1).all())
    if isinstance(layer, ModulesToSaveWrapper):  # a copy of the module
        own, original = (
            dict(m.named_parameters()) for m in (layer.modules_to_save[name], layer.original_module)
        )
        return own.keys() == original.keys() and all(torch.equal(own[key], original[key]) for key in own)
    return False


def _is_zero(part: nn.Module | Tensor) -> bool:
    weight = part if isinstance(part, Tensor) else part.weight
    return isinstance(weight, Tensor) and not bool(weight.any())


def why_not_off(model: nn.Module) -> str | None:
    """Why switching the adapters off would not give a fixed base, in words; None where it does."""
    if not isinstance(model, PeftModel):
        return "it has no adapter to switch off"
    for name in model.peft_config:
        if not model_capabilities(model, name).off_is_base:
            return (
                f"its adapter {name!r} does not declare off_is_base: switched off, it leaves a changed base"
            )
    trained = [name for name, weight in parameters_in_use(model, ()).items() if weight.requires_grad]
    if trained:
        return f"weights outside its adapters are trained too, {trained[0]} among {len(trained)}"
    return None
