"""LoRA that starts from the base's own factors, PiSSA and OLoRA among them: the base gives them up.

    W  ->  W - s B0 A0,   A and B start at A0 and B0

So the base under such an adapter is another one: it cannot be switched off to give W back, nor share its
base with a second adapter. Its initial factors are kept beside it. With them it is exported as an ordinary
LoRA of rank 2r on W, which every loader reads without repeating a decomposition,

    W - s B0 A0 + s B A  =  W + s [B, -B0] [A; A0]

and a checkpoint holds them too. A randomised decomposition (``pissa_niter_k``) is drawn from a seed of its
own, so that every process starts from the same factors.

Source: Meng et al. 2024 (arXiv:2404.02948), appendix C.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftlib.errors import CapabilityError, CheckpointError

__all__ = [
    "InitialFactors",
    "changes_base",
    "convert_config",
    "converted_state",
    "keep_initial",
    "own_generator",
    "require_own_base",
    "require_plain_layout",
    "require_repeatable",
]

_CHANGES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # these subtract from the base
_SEED = 0  # of randomised decompositions


def changes_base(config: PeftConfig) -> bool:
    """Whether an adapter starts by writing into the base."""
    return _init_of(config).startswith(_CHANGES)


def _init_of(config: PeftConfig) -> str:
    return str(config.init_lora_weights) if isinstance(config, LoraConfig) else ""


def _is_randomised(config: PeftConfig) -> bool:
    return "niter" in _init_of(config)


def require_plain_layout(config: PeftConfig, model: nn.Module) -> None:
    """Raise `CapabilityError` for OLoRA on transposed matrices, which peft takes for plain ones."""
    if _init_of(config) == "olora" and any(type(module) is Conv1D for module in model.modules()):
        raise CapabilityError(
            "attach: expected matrices stored as [outputs, inputs] for init='olora', got transposed ones, as "
            "GPT-2 keeps them. Take init='pissa'."
        )


def require_own_base(model: PeftModel, config: PeftConfig) -> None:
    """Raise `CapabilityError` where one more adapter would move another one, or start from a changed base."""
    there = [name for name, each in model.peft_config.items() if changes_base(each)]
    if there or changes_base(config):
        found = (
            f"the adapter {there[0]!r}, which changed it"
            if there
            else f"one that init={_init_of(config)!r} would change under {sorted(model.peft_config)}"
        )
        raise CapabilityError(
            f"attach: expected a base that stays as it is for a second adapter, got {found}. Fold the first "
            "one in, ftlib.adapters.merge(model), or start both from init='default'."
        )


def require_repeatable(config: PeftConfig, folder: Path) -> None:
    """Raise `CapabilityError` for a saved adapter that starts from a randomised decomposition of its base."""
    if _is_randomised(config):
        raise CapabilityError(
            f"{folder}: init_lora_weights: expected factors that can be made again, got "
            f"{_init_of(config)!r}, drawn at random where it was trained. Save it there with "
            "ftlib, or with peft's path_initial_model_for_weight_conversion."
        )


@contextmanager
def own_generator(config: PeftConfig, model: nn.Module) -> Iterator[None]:
    """While a randomised decomposition runs, torch's generators start from a fixed state."""
    if not _is_randomised(config):
        yield
        return
    devices = {weight.device for weight in model.parameters() if weight.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        torch.manual_seed(_SEED)
        yield


def keep_initial(model: PeftModel, name: str) -> None:
    """Keep the factors that a fresh adapter took from the base, as buffers that nobody saves by accident.

    Raises:
        CapabilityError: a matrix with fewer directions than the rank.
    """
    config = model.peft_config[name]
    if not changes_base(config) or _init_of(config) == "loftq":  # whose base is rounded besides
        return
    layers: list[Any] = [
        each for each in model.modules() if isinstance(each, LoraLayer) and name in each.lora_A
    ]
    for layer in layers:
        found, asked = layer.lora_A[name].weight.shape[0], layer.r[name]
        if found != asked:
            raise CapabilityError(
                f"attach: expected matrices with r={asked} directions for init={_init_of(config)!r}, got one "
                f"with {found}. Take that rank, or name larger targets, on a model loaded anew."
            )
    for layer in layers:
        for side in ("A", "B"):
            factor = getattr(layer, f"lora_{side}")[name].weight
            layer.register_buffer(f"initial_{side}_{name}", factor.detach().clone(), persistent=False)


def _kept(model: nn.Module, name: str) -> dict[str, tuple[Any, Tensor, Tensor]]:
    """Module name -> layer, A0 and B0, of the layers that keep them."""
    found: dict[str, tuple[Any, Tensor, Tensor]] = {}
    for where, layer in model.named_modules():
        factors = [layer._buffers.get(f"initial_{side}_{name}") for side in "AB"]
        if factors[0] is not None and factors[1] is not None:
            found[where] = (layer, factors[0], factors[1])
    return found


def converted_state(model: PeftModel, name: str) -> dict[str, Tensor] | None:
    """The model's state with an adapter's factors as those of a LoRA on the original base; None if they are.

    Raises:
        CapabilityError: a randomised decomposition whose initial factors nobody kept.
    """
    kept = _kept(model, name)
    if not kept:
        if _is_randomised(model.peft_config[name]):
            raise CapabilityError(
                f"save: expected an adapter whose initial factors are known, got {name!r}, whose randomised "
                "decomposition was made elsewhere and cannot be made again. Attach it with "
                "ftlib.adapters.attach."
            )
        return None
    state: dict[str, Tensor] = model.state_dict()
    for where, (_, a_rI, b_Or) in kept.items():
        keys = [f"{where}.lora_{side}.{name}.weight" for side in ("A", "B")]
        state[keys[0]] = torch.cat([state[keys[0]], a_rI.to(state[keys[0]].dtype)])
        state[keys[1]] = torch.cat([state[keys[1]], -b_Or.to(state[keys[1]].dtype)], dim=1)
    return state


def convert_config(path: Path) -> None:
    """Make a saved ``adapter_config.json`` one of twice the rank and the same scale."""
    config = json.loads(path.read_text(encoding="utf-8"))
    factor = math.sqrt(2) if config["use_rslora"] else 2
    config["init_lora_weights"] = True
    config["r"] *= 2
    config["lora_alpha"] *= factor
    config["rank_pattern"] = {key: 2 * rank for key, rank in (config["rank_pattern"] or {}).items()}
    config["alpha_pattern"] = {key: factor * one for key, one in (config["alpha_pattern"] or {}).items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@final
class InitialFactors:
    """The initial factors of a model's adapters, as a part of checkpoints: tensors by layer and side.

    Args:
        model: with adapters; any other has none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = tuple(model.peft_config) if isinstance(model, PeftModel) else ()
        self._model = model

    def __bool__(self) -> bool:
        """Whether there are any."""
        return any(_kept(self._model, name) for name in self._names)

    def state_dict(self) -> dict[str, Tensor]:
        """By the name of the layer and of the buffer."""
        return {
            f"{where}.initial_{side}_{name}": factor
            for name in self._names
            for where, (_, *factors) in _kept(self._model, name).items()
            for side, factor in zip("AB", factors, strict=True)
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take the factors of another start over: the base gives up those, and gets its own back.

        Raises:
            CheckpointError: factors of other layers or ranks.
        """
        own = self.state_dict()
        shapes = [{key: tuple(each.shape) for key, each in one.items()} for one in (own, state)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"initial factors: expected those of {len(own)} layers and sides as in this model, got "
                f"{len(state)} that differ. Attach the adapter with the settings of the run that was saved."
            )
        for name in self._names:
            for where, (layer, a_rI, b_Or) in _kept(self._model, name).items():
                new_a, new_b = (state[f"{where}.initial_{side}_{name}"].to(a_rI.device) for side in "AB")
                if not (torch.equal(new_a, a_rI) and torch.equal(new_b, b_Or)):
                    change_OI = layer.scaling[name] * (b_Or @ a_rI - new_b @ new_a)
                    layer.get_base_layer().weight += transpose(change_OI, layer.fan_in_fan_out)
                    a_rI.copy_(new_a)
                    b_Or.copy_(new_b)
