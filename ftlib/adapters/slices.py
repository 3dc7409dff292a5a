"""IA3 on one matrix that holds queries, keys and values: the queries keep their scale of 1.

Which outputs are keys and values is seen, not assumed, since architectures lay them out in different ways:
the query of a token never reaches the attention output of another token, its key and value do.

Shapes: L tokens, O outputs of the fused matrix, D hidden width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.ia3.layer import Linear as PeftIA3Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftlib.adapters.structure import find_projections
from ftlib.errors import CapabilityError

__all__ = ["SlicedIA3Linear", "keys_and_values", "slice_fused"]

_TOKENS = 8  # of the row that is looked at


class SlicedIA3Linear(PeftIA3Linear):
    """peft's IA3 layer, in which only the outputs named by a mask are scaled and trained.

    The vector is as long as peft's, with 1 elsewhere, so a saved adapter is plain peft.
    """

    trained_O: Tensor  # bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., I] to [..., O], in the dtype of the base layer's output."""
        active = [name for name in self.active_adapters if name in self.ia3_l]
        if self.disable_adapters or self.merged or not active:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        output: Tensor = self.base_layer(x, *args, **kwargs)
        scaled = output
        for name in active:
            vector_O = self.ia3_l[name].flatten()
            scaled = scaled * torch.where(self.trained_O, vector_O, torch.ones_like(vector_O))
        return scaled.to(output.dtype)


def slice_fused(model: PeftModel, name: str) -> None:
    """Let an adapter of IA3 scale only keys and values in matrices that hold queries too.

    A saved adapter that scales queries, as peft trains them, is left as it is.

    Raises:
        CapabilityError: keys and values cannot be told from the queries, or the matrix is quantised.
    """
    inner = cast(PreTrainedModel, model.get_base_model())
    for where in find_projections(inner).fused:
        layer: Any = inner.get_submodule(where)
        if not isinstance(layer, BaseTunerLayer) or name not in getattr(layer, "ia3_l", ()):
            continue
        if not isinstance(layer, PeftIA3Linear):
            raise CapabilityError(
                f"ia3: expected plain weights in {where!r}, which holds queries, keys and values, got "
                f"{type(layer.get_base_layer()).__name__}. Load the base without quantize, or use lora()."
            )
        trained_O = keys_and_values(inner, where)
        vector_O = layer.ia3_l[name].detach().flatten()
        if bool((vector_O[~trained_O] == 1).all()):
            layer.register_buffer("trained_O", trained_O.to(vector_O.device), persistent=False)
            layer.__class__ = SlicedIA3Linear  # peft makes its layers without a place for our own


def keys_and_values(model: PreTrainedModel, where: str) -> Tensor:
    """Which outputs of a fused matrix are keys or values, bool [O].

    Args:
        model: with the matrix; run once on a short row.
        where: name of the matrix, a child of its attention module.

    Raises:
        CapabilityError: nothing of the matrix, or all of it, reaches other tokens.
    """
    seen: dict[str, Tensor] = {}

    def keep_fused(_matrix: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        seen["fused"] = output.detach().requires_grad_()
        return seen["fused"]

    def keep_attended(_attention: nn.Module, _inputs: Any, output: Any) -> None:
        seen["attended"] = output if isinstance(output, Tensor) else output[0]

    matrix, attention = model.get_submodule(where), model.get_submodule(where.rpartition(".")[0])
    handles = [matrix.register_forward_hook(keep_fused), attention.register_forward_hook(keep_attended)]
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids_1L = (torch.arange(_TOKENS, device=model.device)[None] * 7 + 5) % vocabulary
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.enable_grad():
            model.base_model.eval()(input_ids=ids_1L)
        last_D = seen["attended"].reshape(_TOKENS, -1)[-1]
        # a direction of no special kind, lest the parts of a symmetric output cancel
        direction_D = torch.linspace(1.0, 2.0, len(last_D), device=last_D.device, dtype=last_D.dtype)
        (reach,) = torch.autograd.grad((last_D * direction_D).sum(), seen["fused"])
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    trained_O = reach.reshape(_TOKENS, -1)[:-1].ne(0).any(0)
    if bool(trained_O.all()) or not bool(trained_O.any()):
        raise CapabilityError(
            f"ia3: expected queries beside keys and values in {where!r}, found that {int(trained_O.sum())} "
            f"of its {len(trained_O)} outputs reach other tokens. Name other targets: ia3(targets=[...])."
        )
    return trained_O
