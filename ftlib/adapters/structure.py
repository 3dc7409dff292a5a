"""Where a transformer keeps its keys, its values and the way out of its feed-forward blocks.

Found by structure, not by a table of architectures: an attention module is one whose own linear layers
play the roles of key and value, or one fused matrix that holds both; a down-projection is the linear layer
outside attention that leads back to the hidden width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast, final

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

__all__ = ["Projections", "find_projections", "shortest_names"]

# How transformers names the linear layers of an attention module, k_proj, key, k_lin and k alike.
_KEY = re.compile(r"k(ey)?(_?(proj|lin|layer))?$", re.IGNORECASE)
_VALUE = re.compile(r"v(alue)?(_?(proj|lin|layer))?$", re.IGNORECASE)
_FUSED = re.compile(
    r"(w?qkv|qkv_proj|in_proj|c_attn|query_key_value|kv_proj|query_key_value_proj)$", re.IGNORECASE
)


@final
@dataclass(frozen=True)
class Projections:
    """Names of linear layers in a model, as `named_modules` gives them, in its order.

    Args:
        keys: one per attention module whose matrices are apart.
        values: likewise.
        fused: matrices that hold keys and values together with something else.
        downs: the last matrix of each feed-forward block, expert by expert.
    """

    keys: tuple[str, ...]
    values: tuple[str, ...]
    fused: tuple[str, ...]
    downs: tuple[str, ...]


def find_projections(model: PreTrainedModel) -> Projections:
    """The keys, values and down-projections of a model, with or without adapters on it."""
    linears = dict(_linears(model))
    owners: dict[str, dict[str, nn.Module]] = {}
    for name, module in linears.items():
        owner, _, own = name.rpartition(".")
        owners.setdefault(owner, {})[own] = module
    keys: list[str] = []
    values: list[str] = []
    fused: list[str] = []
    attention: list[str] = []
    for owner, members in owners.items():
        found = {
            role: [f"{owner}.{own}" for own in members if pattern.fullmatch(own)]
            for role, pattern in (("key", _KEY), ("value", _VALUE), ("fused", _FUSED))
        }
        if found["key"] and found["value"]:
            keys += found["key"]
            values += found["value"]
        elif found["fused"]:
            fused += found["fused"]
        else:
            continue
        attention.append(owner)
    return Projections(tuple(keys), tuple(values), tuple(fused), tuple(_downs(linears, attention)))


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer by the name it has without adapters."""
    for name, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        inside = any(part in ("base_layer", "lora_A", "lora_B") for part in name.split("."))
        if isinstance(base, nn.Linear | Conv1D) and not inside:
            yield name, base


def _downs(linears: dict[str, nn.Module], attention: list[str]) -> Iterator[str]:
    """Of each layer that attends, what leads to the hidden width from another one, or else comes last."""
    for layer in dict.fromkeys(filter(None, map(_layer_of, attention))):
        width = _width(linears, attention, layer)
        outside = [
            name
            for name in linears
            if name.startswith(f"{layer}.") and not name.startswith(tuple(f"{each}." for each in attention))
        ]
        back = [name for name in outside if _sizes(linears[name])[1] == width]
        wider = [name for name in back if _sizes(linears[name])[0] != width]
        yield from wider or back[-1:]


def _width(linears: dict[str, nn.Module], attention: list[str], layer: str) -> int:
    """The hidden width, as the layer's first attention reads it."""
    first = next(each for each in attention if each.startswith(f"{layer}."))
    return next(_sizes(module)[0] for name, module in linears.items() if name.startswith(f"{first}."))


def _layer_of(name: str) -> str | None:
    """The outermost numbered module on the way to a module: one block of the stack."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return None if number is None else ".".join(parts[: number + 1])


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Width of the input and of the output; GPT-2's layers keep their matrices transposed."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    linear = cast(nn.Linear, module)
    return linear.in_features, linear.out_features


def shortest_names(model: nn.Module, chosen: Iterable[str]) -> list[str]:
    """Endings of names that fit these modules and no others, as few and as short as possible.

    An ending starts at a dot, as peft matches `target_modules`.
    """
    wanted = set(chosen)
    others = [f".{name}" for name, _ in model.named_modules() if name not in wanted]
    endings: list[str] = []
    for name in sorted(wanted):
        if any(f".{name}".endswith(f".{ending}") for ending in endings):
            continue
        parts = name.split(".")
        tails = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        endings.append(next((t for t in tails if not any(o.endswith(f".{t}") for o in others)), name))
    return sorted(endings)
