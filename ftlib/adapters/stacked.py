"""An adapter of weights beneath virtual tokens: where it lies in a model, and how it is saved.

peft puts virtual tokens around a whole model and freezes all that is in it, the layers of other adapters too.
Here these layers lie in the model as peft's own injection leaves them, under the name of the virtual tokens,
and are trainable again. Switched off or on, both follow the name.

Saved, each of the two is an adapter of peft: the virtual tokens in the folder, the weights in its subfolder
`BENEATH`. Plain peft reads one after the other:

    base = PeftModel.from_pretrained(base, folder, subfolder="weights").get_base_model()
    model = PeftModel.from_pretrained(base, folder)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ftlib.adapters.initial import convert_config, converted_state
from ftlib.adapters.tokens import is_row
from ftlib.adapters.vetting import BENEATH, part_beside, part_files, read_json
from ftlib.errors import CapabilityError, CheckpointError

__all__ = ["beneath", "fill_beneath", "read_beneath", "require_one_level", "save_beneath", "train_beneath"]

_PREFIX = "base_model.model."  # of all names in a saved adapter of weights


def beneath(model: nn.Module, name: str) -> PeftConfig | None:
    """The configuration of the weights under the virtual tokens `name`; None where there are none."""
    if not isinstance(model, PeftModel) or not model.peft_config[name].is_prompt_learning:
        return None
    injected: Mapping[str, PeftConfig] = vars(model.base_model).get("peft_config", {})  # where peft leaves it
    return injected.get(name)


def require_one_level(model: nn.Module) -> None:
    """Raise `CapabilityError` for a model on which neither a stack nor anything beside one has a place."""
    if isinstance(model, PeftModel):
        raise CapabilityError(
            f"attach: expected a plain model for virtual tokens with weights beneath, or a model without "
            f"them, got the adapters {sorted(model.peft_config)}. Give a model of its own: ftlib.load(name)."
        )


def train_beneath(model: PeftModel, name: str, *, trained: bool) -> None:
    """Make the layers under the virtual tokens `name` the active ones, trained or frozen as these are."""
    if beneath(model, name) is not None:
        for layer in model.base_model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.set_adapter([name], inference_mode=not trained)


def save_beneath(folder: Path, model: PeftModel, *, flat: bool = False) -> None:
    """Write the weights under the active virtual tokens beside them, if there are any.

    Args:
        folder: with the virtual tokens as peft wrote them.
        model: whose they are.
        flat: see `part_files`.
    """
    name = str(model.active_adapter)
    config, inner = beneath(model, name), cast(Any, model.base_model)
    if config is None:
        return
    converted = converted_state(inner, name)
    state = get_peft_model_state_dict(
        inner, state_dict=converted, adapter_name=name, save_embedding_layers=False
    )
    config_path, weights_path = part_files(folder, BENEATH, flat=flat)
    config_path.parent.mkdir(exist_ok=True)
    settings = {**config.to_dict(), "inference_mode": True}
    text = json.dumps(settings, indent=2, sort_keys=True, default=sorted)  # peft keeps targets as sets
    config_path.write_text(text + "\n", encoding="utf-8")
    if converted is not None:
        convert_config(config_path)
    kept = {
        f"{_PREFIX}{key}": value.detach().cpu().contiguous()
        for key, value in state.items()
        if not is_row(key)  # of new tokens, which are saved beside the virtual ones
    }
    save_file(kept, weights_path, metadata={"format": "pt"})


def read_beneath(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]] | None:
    """Configuration and weights of a saved adapter beneath virtual tokens; None where there is none."""
    files = part_beside(folder, BENEATH)
    if files is None:
        return None
    config: PeftConfig = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**read_json(files[0])))
    config.inference_mode = False
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # what is drawn is overwritten
    return config, load_file(files[1])


def fill_beneath(made: PeftModel, state: Mapping[str, Tensor], name: str, folder: Path) -> None:
    """Give an adapter of weights those that were saved.

    Raises:
        CheckpointError: weights of other layers, or of other sizes.
    """
    own = get_peft_model_state_dict(made, adapter_name=name, save_embedding_layers=False)
    shapes = [{key: tuple(one.shape) for key, one in each.items()} for each in (own, state)]
    if shapes[0] != shapes[1]:
        odd = sorted(key for key in own.keys() | state.keys() if shapes[0].get(key) != shapes[1].get(key))
        raise CheckpointError(
            f"{folder / BENEATH}: expected weights of the layers of this base, got others, {odd[0]!r} among "
            f"{len(odd)}. Load the adapter on the base it was trained on."
        )
    set_peft_model_state_dict(made, dict(state), adapter_name=name)
