"""The state of a torch optimiser as named tensors and plain numbers, and back, bit for bit.

`torch.optim.Optimizer.load_state_dict` numbers parameters by position and casts their state to the
parameter's dtype, which loses the float32 moments of bfloat16 weights. Here everything is keyed by the
parameter's name and nothing is cast.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ftlib.errors import CheckpointError
from ftlib.models.sharding import distributed_like

__all__ = ["flatten_optimizer", "restore_optimizer"]

# How a step is computed, not what it computes: these stay as the present machine chose them.
_MACHINE_OPTIONS = frozenset({"params", "param_names", "foreach", "fused", "capturable", "differentiable"})


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors for safetensors and values for JSON.

    Args:
        optimizer: any torch optimiser whose per-parameter state holds tensors, numbers, strings and None.
        names: name -> parameter, as ``dict(model.named_parameters())`` or a table of fp32 masters.

    Returns:
        tensors ``"<state>/<parameter>"`` -> tensor, not copied, e.g. ``"exp_avg/lm_head.weight"``;
        and a JSON object with the options, parameters and shapes of each group and the other values.

    Raises:
        CheckpointError: a parameter without a name, or state of another type.
    """
    name_of = {id(parameter): name for name, parameter in names.items()}
    tensors: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []
    values: dict[str, dict[str, Any]] = {}
    for index, group in enumerate(optimizer.param_groups):
        members = {_name(name_of, parameter, index): parameter for parameter in group["params"]}
        options = {key: value for key, value in group.items() if key not in _MACHINE_OPTIONS}
        tensors |= {
            f"group {index} {key}/": value for key, value in options.items() if isinstance(value, Tensor)
        }
        groups.append(
            {
                "parameters": {name: list(parameter.shape) for name, parameter in members.items()},
                "options": {
                    key: _value(value, f"group {index}, {key}")
                    for key, value in options.items()
                    if not isinstance(value, Tensor)
                },
            }
        )
        for name, parameter in members.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{key}/{name}"] = value
                else:
                    values.setdefault(name, {})[key] = _value(value, f"{name}, {key}")
    return tensors, {"groups": groups, "values": values}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> None:
    """Put back what `flatten_optimizer` returned. The tensors are copied.

    Args:
        optimizer: built over the same parameters in groups of the same members; options of the groups
            are overwritten except foreach, fused, capturable and differentiable.
        names: name -> parameter, as when it was flattened.
        tensors: the named tensors.
        scalars: the JSON object.

    Raises:
        CheckpointError: other parameters, shapes or groups than the state was taken from. Nothing was
            changed then.
    """
    name_of = {id(parameter): name for name, parameter in names.items()}
    saved = scalars["groups"]
    if len(saved) != len(optimizer.param_groups):
        raise CheckpointError(
            f"optimizer: expected {len(saved)} parameter groups, got {len(optimizer.param_groups)}. "
            "Build it as it was when the checkpoint was written."
        )
    owners: dict[str, tuple[Tensor, dict[str, Any]]] = {}
    for index, (group, entry) in enumerate(zip(optimizer.param_groups, saved, strict=True)):
        members = {_name(name_of, parameter, index): parameter for parameter in group["params"]}
        shapes = {name: list(parameter.shape) for name, parameter in members.items()}
        _check_members(index, entry["parameters"], shapes)
        owners |= {name: (parameter, group) for name, parameter in members.items()}

    states: dict[str, dict[str, Any]] = {}
    for path, value in tensors.items():
        key, _, name = path.partition("/")
        if name:
            parameter, group = _owner(owners, name)
            own = value.detach().to(_device(key, parameter, group), copy=True)
            like = parameter if own.shape == parameter.shape else own
            states.setdefault(name, {})[key] = distributed_like(own, like)
    for name, entries in scalars["values"].items():
        _owner(owners, name)
        states.setdefault(name, {}).update({key: _unvalue(value) for key, value in entries.items()})

    for index, (group, entry) in enumerate(zip(optimizer.param_groups, saved, strict=True)):
        group.update({key: _unvalue(value) for key, value in entry["options"].items()})
        prefix = f"group {index} "
        for path, value in tensors.items():
            if path.startswith(prefix) and path.endswith("/"):
                group[path[len(prefix) : -1]] = value.detach().clone()
    for name, (parameter, _) in owners.items():
        optimizer.state.pop(parameter, None)
        if name in states:
            optimizer.state[parameter] = states[name]


def _device(key: str, parameter: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Where torch keeps it: beside the parameter, except the step count of an unfused optimiser."""
    beside = key != "step" or group.get("fused") or group.get("capturable")
    return parameter.device if beside else torch.device("cpu")


def _name(name_of: Mapping[int, str], parameter: Tensor, group: int) -> str:
    if id(parameter) not in name_of:
        raise CheckpointError(
            f"optimizer: expected a name for each parameter, got none for one of shape "
            f"{tuple(parameter.shape)} in group {group}. Pass every parameter the optimizer was built with."
        )
    return name_of[id(parameter)]


def _owner(owners: Mapping[str, tuple[Tensor, dict[str, Any]]], name: str) -> tuple[Tensor, dict[str, Any]]:
    if name not in owners:
        raise CheckpointError(f"optimizer: got state of {name!r}, which none of the saved groups holds.")
    return owners[name]


def _check_members(index: int, saved: Mapping[str, list[int]], current: Mapping[str, list[int]]) -> None:
    differing = sorted(name for name in {*saved, *current} if saved.get(name) != current.get(name))
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"optimizer: group {index}: expected {name} with shape {saved.get(name, 'absent')}, got "
            f"{current.get(name, 'absent')} ({len(differing)} such). Use the checkpoint's adapter and model."
        )


def _value(value: Any, where: str) -> Any:
    """A value as JSON. Tuples are marked, because torch wants betas back as the tuple they were."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_value(item, where) for item in value]}
    if isinstance(value, list):
        return [_value(item, where) for item in value]
    raise CheckpointError(
        f"optimizer: {where}: expected a tensor or a plain value, got {type(value).__name__}. "
        "Keep such state out of the optimizer, or save it yourself."
    )


def _unvalue(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple(_unvalue(item) for item in value["tuple"])
    return [_unvalue(item) for item in value] if isinstance(value, list) else value
