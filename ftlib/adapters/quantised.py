"""Bases whose linear layers bitsandbytes holds in 4 or 8 bits: what to ask of them, and the way back.

They stay frozen; adapters and heads on them are float32. int8 needs an outlier threshold of 0: with one,
which columns are outliers depends on the other rows of the batch.

Source: Dettmers et al. 2023 (arXiv:2305.14314), section 3; int8: Dettmers et al. 2022 (arXiv:2208.07339).
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import get_bnb_param_type
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ftlib.errors import CapabilityError

__all__ = [
    "adopt_quantisation",
    "dequantised",
    "fit_quantised",
    "is_quantised",
    "quantised_layers",
    "require_trainable",
    "steady",
]

# What transformers notes on a model that it quantised, and peft reads.
_NOTES = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer")


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every linear layer that bitsandbytes holds."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and get_bnb_param_type(weight):
            yield name, module


def is_quantised(model: nn.Module) -> bool:
    """Whether a model has any such layer."""
    return next(quantised_layers(model), None) is not None


def steady(model: nn.Module) -> None:
    """Make the quantised layers of a model compute the same in training and in evaluation.

    Raises:
        CapabilityError: int8 layers with an outlier threshold.
    """
    layers = [module for _, module in quantised_layers(model)]
    if not layers:
        return
    from ftlib.adapters.steady import SteadyLinear4bit, SteadyLinear8bit

    for layer in layers:
        eight = get_bnb_param_type(layer.weight) == "8bit"
        if eight and layer.state.threshold != 0.0:
            raise CapabilityError(
                f"quantised base: expected int8 layers without an outlier threshold, got "
                f"{layer.state.threshold}, with which a row's result depends on its batch. Load it with "
                "ftlib.load(name, quantize='int8'), or with BitsAndBytesConfig(load_in_8bit=True, "
                "llm_int8_threshold=0.0)."
            )
        layer.__class__ = SteadyLinear8bit if eight else SteadyLinear4bit
        layer.train()


_LEAVE_BASE = (True, False, "gaussian", "orthogonal", "eva")


def fit_quantised(config: PeftConfig, model: nn.Module) -> None:
    """Make a quantised base ready for an adapter; any other one is left alone.

    Raises:
        CapabilityError: the adapter would write into the base, or see `steady`.
    """
    if not is_quantised(model):
        return
    if isinstance(config, LoraConfig) and config.init_lora_weights not in _LEAVE_BASE:
        raise CapabilityError(
            f"attach: expected an initialisation that leaves a quantised base as it is, got "
            f"{config.init_lora_weights!r}. Take init='default', 'gaussian', 'orthogonal' or 'eva', or load "
            "the base without quantize."
        )
    steady(model)


def require_trainable(model: nn.Module) -> None:
    """Raise `CapabilityError` for a quantised base without an adapter: integers have no gradient."""
    if not isinstance(model, PeftModel) and is_quantised(model):
        raise CapabilityError(
            "full fine-tuning: expected weights that can be trained, got a base quantised to integers, which "
            "have no gradient. Train an adapter on it, adapter=ftlib.adapters.lora(), or load it without "
            "quantize."
        )


def adopt_quantisation(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Note on a model that holds the quantised layers of another one that they are quantised."""
    for note in _NOTES:
        if note in vars(other):
            setattr(model, note, vars(other)[note])


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """A plain copy of a model, or of the base under its adapters, in the dtype it computes in.

    The weights are those that the quantised layers compute with, so logits are equal; on a GPU int8
    layers round their inputs too, which the copy does not.
    """
    steady(model)
    config = deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        copy = type(model)(config)
    _fill(copy, model, model.dtype, {})
    copy.name_or_path = model.name_or_path
    if copy.can_generate():
        copy.generation_config = deepcopy(model.generation_config)
    return cast(PreTrainedModel, copy.train(model.training))


def _fill(copy: nn.Module, own: Any, dtype: torch.dtype, done: dict[int, nn.Parameter]) -> None:
    """Copy weights and buffers into a model that has none; tied weights stay tied."""
    while isinstance(own, BaseTunerLayer | AuxiliaryTrainingWrapper):
        own = own.get_base_layer() if isinstance(own, BaseTunerLayer) else own.original_module
    for name, weight in own._parameters.items():
        if weight is None:
            continue
        if id(weight) not in done:
            packed = get_bnb_param_type(weight)
            plain = own.plain(dtype) if packed else weight
            if packed and isinstance(copy, Conv1D):
                plain = plain.T  # GPT-2 keeps its matrices transposed, bitsandbytes does not
            done[id(weight)] = nn.Parameter(_copied(plain), requires_grad=weight.requires_grad)
        copy._parameters[name] = done[id(weight)]
    for name, buffer in own._buffers.items():
        copy._buffers[name] = None if buffer is None else _copied(buffer)
    for name, child in own._modules.items():
        if child is not None:
            _fill(cast(nn.Module, copy._modules[name]), child, dtype, done)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()
