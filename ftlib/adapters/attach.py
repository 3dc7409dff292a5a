"""Bind an adapter to a model, fold it in, save it, load it: peft does the work.

`attach` changes the model it is given, as peft does: its linear layers are wrapped in place and its
base weights frozen. A score head is trained and saved with every adapter. `merge` is the way back to a
plain transformers model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import cast

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.peft_types import PeftType
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ftlib.adapters.adapter import Adapter
from ftlib.adapters.capability import FULL, Capabilities, capabilities_of, intersection
from ftlib.adapters.classes import read_classes, set_classes
from ftlib.adapters.encoder_head import encoder_head
from ftlib.adapters.encoder_soft import read_config
from ftlib.adapters.eva import fit_eva, set_eva
from ftlib.adapters.fused import fuse
from ftlib.adapters.ia3 import fit_ia3
from ftlib.adapters.initial import (
    keep_initial,
    own_generator,
    require_own_base,
    require_plain_layout,
    require_repeatable,
)
from ftlib.adapters.normalisation import normalisation_of, read_normalisation, set_normalisation
from ftlib.adapters.quantised import dequantised, fit_quantised, is_quantised, require_trainable
from ftlib.adapters.shared import require_unshared
from ftlib.adapters.slices import slice_fused
from ftlib.adapters.soft import fit_virtual_tokens, set_start
from ftlib.adapters.stacked import (
    beneath,
    fill_beneath,
    read_beneath,
    require_one_level,
    train_beneath,
)
from ftlib.adapters.targets import require_modules
from ftlib.adapters.task import SCORE, fit_task, score_head
from ftlib.adapters.tokens import fit_new_tokens, grow_for_tokens, load_rows, read_rows_here
from ftlib.adapters.vetting import WEIGHTS, check_adapter
from ftlib.adapters.virtual_classifier import place_virtual_tokens
from ftlib.checks import Wanted, check
from ftlib.errors import CapabilityError, ConfigError

__all__ = ["attach", "load_adapter", "merge", "model_capabilities", "require_model"]

AnyModel = PreTrainedModel | PeftModel
MODEL = Wanted("a transformers model or a peft model", lambda value: isinstance(value, nn.Module))
ADAPTER = Wanted(
    "what ftlib.adapters makes, a peft.PeftConfig, or a saved adapter's folder",
    lambda value: isinstance(value, Adapter | PeftConfig),
)
NAME = Wanted(
    "a word without dots", lambda value: isinstance(value, str) and bool(value) and "." not in value
)


def attach(
    model: AnyModel,
    adapter: Adapter | PeftConfig | str | Path,
    *,
    name: str = "default",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> AnyModel:
    """Put an adapter on a model and make its weights the trainable ones.

    Args:
        model: a transformers model, changed in place; or a peft model, which gets one more adapter.
        adapter: what `ftlib.adapters` makes, any `peft.PeftConfig` (copied, never changed), or the
            folder of a saved adapter.
        name: the adapter's name in the model.
        tokenizer: splits a text that virtual tokens start from.

    Returns:
        The model to train: `model` itself for `full()`, else a `PeftModel` around it.

    Raises:
        ConfigError: the name is taken or no name, modules that are not there, or a text to start from without
            a tokenizer.
        CapabilityError: `full()` on a model that already has adapters, an adapter of a score head on a
            language model, one that writes into a base which another model shares, adapters of two kinds of
            which one would be frozen silently, or `stack()` beside any other adapter.

    See `load_adapter` for what a folder may raise.
    """
    require_model("attach", model)
    if isinstance(adapter, str | Path):
        return load_adapter(model, adapter, name=name)
    check("attach", {"adapter": (adapter, ADAPTER), "name": (name, NAME)})
    own = isinstance(adapter, Adapter)
    adapter = adapter if isinstance(adapter, Adapter) else Adapter.of(adapter)
    require_unshared(model, adapter.config)
    if adapter.config is None:
        if isinstance(model, PeftModel):
            raise CapabilityError(
                "attach: expected a plain transformers model for full fine-tuning, got one with adapters. "
                "Merge them first: ftlib.adapters.merge(model)."
            )
        require_trainable(model)
        return model.requires_grad_(True)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    require_modules(adapter.config, inner, strict=own)
    config = _bound_copy(model, adapter.config)
    fit_eva(config, adapter.data)
    fit_new_tokens(config, model)
    require_plain_layout(config, model)
    if adapter.beneath is not None:
        model = cast(PreTrainedModel, _with_weights(model, adapter.beneath, name).get_base_model())
    if isinstance(model, PeftModel):
        if name in model.peft_config:
            raise ConfigError(
                f"attach: expected a free adapter name, got {name!r}. Taken: {sorted(model.peft_config)}."
            )
        _require_one_kind(model, config)
        require_own_base(model, config)
        model.add_adapter(name, config)
        _activate(model, name, trained=True)
    else:
        with _settled_names(stacked=adapter.beneath is not None), own_generator(config, model):
            model = cast(PeftModel, get_peft_model(model, config, adapter_name=name))
    if adapter.beneath is not None:
        _activate(model, name, trained=True)  # peft froze what it found
    _settle(model, name)
    keep_initial(model, name)
    if adapter.data is not None:
        set_eva(model, name, adapter.data)
    if adapter.start is not None:
        set_start(model, name, adapter.start, tokenizer)
    return model


def load_adapter(
    model: AnyModel, folder: str | Path, *, name: str = "default", trainable: bool = True
) -> PeftModel:
    """Put a saved adapter on a model. The base is the model given, never the one named in the folder.

    Raises:
        ConfigError: not an adapter's folder, or one that is refused.
        CapabilityError: it was trained with a score head and the model has none, or the other way round; or
            with virtual tokens before an encoder's first token, as plain peft puts them.
        CheckpointError: weights that cannot be read, or are not finite.
    """
    folder = Path(folder).expanduser()
    check_adapter(folder)
    config = _bound_copy(model, read_config(folder, model))
    require_repeatable(config, folder)
    require_unshared(model, config)
    grow_for_tokens(folder, model)
    head = [SCORE] if score_head(model) is not None else list(encoder_head(model))
    if head and not _holds(folder, head):
        raise CapabilityError(
            f"{folder / WEIGHTS}: expected an adapter saved with its score head, found none. Fold that of a "
            "language model in first, ftlib.adapters.merge(ftlib.load(base, adapter=folder)[0]), and make "
            "the reward model of the result: ftlib.load(merged, task='reward')."
        )
    weights = read_beneath(folder)
    if weights is not None:
        with torch.random.fork_rng(devices=[]):  # fresh factors are drawn, and overwritten
            made = _with_weights(model, weights[0], name)
        fill_beneath(made, weights[1], name, folder)
        model = cast(PreTrainedModel, made.get_base_model())
    # saved virtual tokens are what their encoder gave, and are themselves what is trained on
    resumes = trainable and not config.is_prompt_learning
    config.inference_mode = not resumes
    if isinstance(model, PeftModel):
        _require_one_kind(model, config)
        require_own_base(model, config)
        model.load_adapter(str(folder), name, is_trainable=resumes, peft_config=config)
    else:
        with _settled_names():
            model = PeftModel.from_pretrained(
                model, str(folder), adapter_name=name, is_trainable=resumes, config=config
            )
    load_rows(folder, model, name)
    _activate(model, name, trained=trainable)
    _settle(model, name)
    set_normalisation(model, read_normalisation(folder))
    classes = read_classes(folder)
    if classes is not None and head:
        set_classes(model, classes)
    return model


def _with_weights(model: AnyModel, below: Adapter | PeftConfig, name: str) -> PeftModel:
    """A plain model with the adapter of weights that virtual tokens will lie over."""
    require_one_level(model)
    return cast(PeftModel, attach(model, below, name=name))


def _settle(model: PeftModel, name: str) -> None:
    """What a new adapter needs once its layers are there."""
    if isinstance(model.peft_config[name], IA3Config):
        slice_fused(model, name)
    read_rows_here(model)
    place_virtual_tokens(model)


def _activate(model: PeftModel, name: str, *, trained: bool) -> None:
    """Make one adapter the active one, and no other trainable, as peft does with those that adapt weights."""
    model.set_adapter(name, inference_mode=not trained)
    if model.active_peft_config.is_prompt_learning:
        for each, encoder in model.prompt_encoder.items():
            encoder.requires_grad_(trained and each == name)
        train_beneath(model, name, trained=trained)


def _require_one_kind(model: PeftModel, config: PeftConfig) -> None:
    if any(beneath(model, each) is not None for each in model.peft_config):
        require_one_level(model)
    if config.peft_type != model.peft_type:
        raise CapabilityError(
            f"attach: expected an adapter of the kind that the model has, {PeftType(model.peft_type).value}, "
            f"got {PeftType(config.peft_type).value}: one of the two would be frozen silently. Train "
            "both as one, ftlib.adapters.stack(prompt(), lora()), or fold the first one in, where it can be: "
            "ftlib.adapters.merge(model)."
        )


@contextmanager
def _settled_names(*, stacked: bool = False) -> Iterator[None]:
    """No warning about a property that peft 0.21 still reads by the name it had before transformers 5.23;
    in a stack, nor about the layers that are there already.
    """
    with warnings.catch_warnings():
        if stacked:
            warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _holds(folder: Path, head: Sequence[str]) -> bool:
    """Whether the weights of every module of the head were saved."""
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        parts = {part for key in weights.keys() for part in key.split(".")}  # noqa: SIM118  not a mapping
    return parts.issuperset(head)


def _bound_copy(model: AnyModel, config: PeftConfig) -> PeftConfig:
    """A copy of the configuration, fitted to this model, with the fused projection where it applies."""
    copy = fuse(deepcopy(config))
    fit_task(copy, model)
    fit_virtual_tokens(copy, model)
    if isinstance(copy, IA3Config):
        fit_ia3(copy, model)
    fit_quantised(copy, model)
    copy.base_model_name_or_path = None  # peft writes the name of the model at hand
    if hasattr(copy, "fan_in_fan_out") and any(type(module) is Conv1D for module in model.modules()):
        copy.fan_in_fan_out = True  # GPT-2 stores its matrices transposed
    return copy


def merge(model: AnyModel) -> PreTrainedModel:
    """Fold the active adapter into the base and return a plain transformers model, with equal logits.

    A quantised base cannot hold the sum: the result is a copy of it in plain weights, and the model stays.

    Raises:
        CapabilityError: the adapter cannot be merged.
    """
    require_model("merge", model)
    if not isinstance(model, PeftModel):
        return dequantised(model) if is_quantised(model) else model
    if not model_capabilities(model).mergeable:
        raise CapabilityError(
            f"merge: expected an adapter that adds to weights, got {model.active_peft_config.peft_type}. "
            "Save the adapter beside its base instead."
        )
    scale = normalisation_of(model)
    if is_quantised(model):
        model = _on_plain_base(model)
    _put_in_place(model)
    merged = cast(PreTrainedModel, model.merge_and_unload())
    set_normalisation(merged, scale)
    return merged


def require_model(where: str, model: object) -> None:
    """Refuse what is no model before something is asked of it.

    Raises:
        ConfigError: the message begins with `where`.
    """
    check(where, {"model": (model, MODEL)})


def _put_in_place(model: PeftModel) -> None:
    """Modules that hold others, such as BERT's pooler, and tables with new rows, as they were trained; peft's
    IA3 fails on them.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ModulesToSaveWrapper) and not hasattr(child.original_module, "weight"):
                active = [each for each in child.active_adapters if each in child.modules_to_save]
                setattr(parent, name, child.modules_to_save[active[0]] if active else child.original_module)
            elif isinstance(child, TrainableTokensWrapper):
                setattr(parent, name, child.unload_and_optionally_merge_module(True, False, None))


def _on_plain_base(model: PeftModel) -> PeftModel:
    """A copy of a model with a quantised base: plain weights, and the same active adapters."""
    copy: AnyModel = dequantised(cast(PreTrainedModel, model.get_base_model()))
    with torch.random.fork_rng(devices=[]):  # fresh factors are drawn, and overwritten
        for name in model.active_adapters:
            config = deepcopy(model.peft_config[name])
            if isinstance(config, LoraConfig):
                config.init_lora_weights = True
            copy = attach(copy, config, name=name)
            state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            set_peft_model_state_dict(copy, state, adapter_name=name)
    made = cast(PeftModel, copy)
    cast(BaseTuner, made.base_model).set_adapter(model.active_adapters)
    return made


def model_capabilities(model: AnyModel, name: str | None = None) -> Capabilities:
    """What the active adapter of a model can do, or the one of this name; `FULL` for a plain model."""
    if not isinstance(model, PeftModel):
        return FULL
    name = str(model.active_adapter) if name is None else name
    own, below = capabilities_of(model.peft_config[name]), beneath(model, name)
    return own if below is None else intersection(own, capabilities_of(below))
