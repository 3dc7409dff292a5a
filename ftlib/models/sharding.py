"""Fully sharded data parallelism (FSDP2): every rank keeps a piece of each weight.

    1. the layers of the body are sharded one by one, then what is left: embeddings, head, norms and virtual
       tokens, with the `Scorer` around them;
    2. a layer is whole while it runs, forward or backward; what is left, while the scorer runs;
    3. outside of both, every weight of the model is a `DTensor`, which the optimiser takes as any other.

Whatever reads a whole weight outside gathers it, and every rank takes part: `whole`, `gathered`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree
from transformers.modeling_layers import GradientCheckpointingLayer

from ftlib.adapters.initial import InitialFactors
from ftlib.errors import CapabilityError
from ftlib.models.forward import Scorer
from ftlib.models.parts import inner_model
from ftlib.models.scoring import Scored

__all__ = ["distributed_like", "gathered", "is_sharded", "shard", "whole", "whole_tensors"]

# torch finds the outputs that a backward starts from in registered records alone
_pytree.register_dataclass(Scored)


def shard(scorer: Scorer, mesh: DeviceMesh) -> None:
    """Leave on each rank its piece of every weight, in place. Values are those of the first rank.

    Args:
        scorer: on any device; its pieces lie on that of the mesh.
        mesh: of one axis, over all ranks.

    Raises:
        CapabilityError: a model that cannot be sharded; it is as it was.
    """
    _require_shardable(scorer)
    layers = [each for each in scorer.modules() if isinstance(each, GradientCheckpointingLayer)]
    for module in (*layers, scorer):
        module.to(mesh.device_type)  # one layer at a time: the whole model need not fit
        for tensor in (*module.parameters(), *module.buffers()):
            if not isinstance(tensor, DTensor):
                dist.broadcast(tensor.detach(), src=0, group=mesh.get_group())
        # the outermost too, so that outside of a forward and its backward nothing is whole
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _require_shardable(scorer: Scorer) -> None:
    inner = inner_model(scorer.model)
    weights = dict(scorer.named_parameters())
    odd = [name for name, weight in weights.items() if weight.is_meta or not weight.is_floating_point()]
    dtypes = sorted({str(weight.dtype) for weight in weights.values() if weight.requires_grad})
    found = None
    if not any(isinstance(each, GradientCheckpointingLayer) for each in inner.modules()):
        found = f"{type(inner).__name__}, which does not say what its layers are"
    elif odd:
        found = f"{odd[0]} among {len(odd)} that are quantised or not loaded"
    elif len(dtypes) > 1:
        found = f"trained weights of {' and '.join(dtypes)}"
    elif InitialFactors(scorer.model):
        found = "an adapter that changed its base when it was attached"
    if found is not None:
        raise CapabilityError(
            f"FSDP: expected a model of layers with floating-point weights, the trained ones of one dtype, "
            f"and a base that stays as it is, got {found}. Train it with plain data parallelism."
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a model, outside of its forward, are pieces."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together where it is a piece. Then every rank takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Each put together, one at a time, those that were pieces on the CPU. Every rank takes part.

    Args:
        tensors: by name, the same on every rank.
        keep: False gathers for the others and returns nothing.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        detached = tensor.detach()
        full = whole(detached)
        if keep:
            found[name] = full if full is detached else full.cpu()
    return found


def distributed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every rank has, as a piece where `like` is one; else, and of a piece, as it is."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    placed = tensor.to(like.device)
    return distribute_tensor(placed, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def gathered(model: nn.Module, *, keep: bool) -> Iterator[None]:
    """While the scope lasts, the weights of a sharded model are whole, on the CPU, where they are kept.

    For what reads a model and does not run it, such as saving. A model that is not sharded is as it is.

    Args:
        model: the same on every rank, and every rank takes part.
        keep: False gathers for the others and leaves the model alone.
    """
    parameters: Iterator[tuple[nn.Module, str, Tensor | None]] = (
        (module, name, weight) for module in model.modules() for name, weight in module._parameters.items()
    )
    places = [place for place in parameters if isinstance(place[2], DTensor)]
    pieces: dict[str, Any] = {str(id(weight)): weight for *_, weight in places}  # once, where they are tied
    full = whole_tensors(pieces, keep=keep)
    held = {
        key: nn.Parameter(tensor, requires_grad=pieces[key].requires_grad) for key, tensor in full.items()
    }
    try:
        for module, name, weight in places if keep else ():
            module._parameters[name] = held[str(id(weight))]
        yield
    finally:
        for module, name, weight in places:
            module._parameters[name] = pieces[str(id(weight))]
