"""Save what was trained, so that plain peft and transformers load it with no ftlib installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftlib.adapters.attach import AnyModel
from ftlib.adapters.classes import CLASSES, classes_of, write_classes
from ftlib.adapters.encoder_soft import write_place
from ftlib.adapters.initial import convert_config, converted_state
from ftlib.adapters.normalisation import SIDECAR, normalisation_of, write_normalisation
from ftlib.adapters.stacked import beneath, save_beneath
from ftlib.adapters.tokens import save_rows
from ftlib.adapters.vetting import BENEATH, NEW_TOKENS
from ftlib.errors import ConfigError
from ftlib.export.card import CardData, card_text, public_name
from ftlib.export.staging import staged
from ftlib.models.modes import evaluation_mode
from ftlib.models.padding import padding_tokenizer
from ftlib.models.parts import inner_model, language_task
from ftlib.models.quiet import quiet

__all__ = ["save", "save_weights"]

_ADAPTER_CONFIG = "adapter_config.json"
_GENERATION_CONFIG = "generation_config.json"
_SHAPE = ("r", "lora_alpha", "num_virtual_tokens")


def save(
    folder: str | Path,
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    card: CardData,
    stop_ids: Sequence[int] = (),
) -> Path:
    """Write the adapter, or the whole model where there is none, with tokenizer and model card.

    An adapter is saved in peft's format, a model as (sharded) safetensors in transformers'. The folder
    appears whole; in one that exists, files of other names stay.

    Args:
        folder: where to; made with its parents.
        model: a peft model, whose active adapter is saved, or a transformers model.
        tokenizer: saved as it is, beside a reward model with that model's pad token; None leaves it out.
        card: what the model card tells; base and adapter are filled in from the model where None.
        stop_ids: what ends a completion, for `generation_config.json`, beside the model's own stop ids.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder is a file, or holds a model of the other kind, which would be mixed up.
        CheckpointError: the disk refuses; nothing half-written is left.
    """
    target = Path(folder).expanduser()
    adapted = not isinstance(model, PreTrainedModel)
    _check_target(target, adapted=adapted)
    if language_task(model) == "seq2seq_lm":
        card = replace(card, auto_class="AutoModelForSeq2SeqLM")
    if classes_of(model) is not None:
        card = replace(card, auto_class="AutoModelForSequenceClassification")
    with staged(target) as staging:
        save_weights(staging, model)
        if stop_ids:
            _write_stops(staging, inner_model(model), stop_ids)
        if isinstance(model, PreTrainedModel):
            card = replace(card, base=card.base or public_name(model.name_or_path))
        else:
            card = _describe_adapter(staging, card)
            write_normalisation(staging, model)
        if tokenizer is not None:
            padding_tokenizer(model, tokenizer).save_pretrained(staging)
        (staging / "README.md").write_text(card_text(card, adapted=adapted), encoding="utf-8")
    if adapted and normalisation_of(model) is None:
        (target / SIDECAR).unlink(missing_ok=True)  # of the adapter that was here
    if adapted and classes_of(model) is None:
        (target / CLASSES).unlink(missing_ok=True)
    for part in {NEW_TOKENS, BENEATH} - set(card.parts):
        if adapted and (target / part).is_dir():
            shutil.rmtree(target / part)
    return target


def save_weights(folder: Path, model: AnyModel, *, flat: bool = False) -> None:
    """Write the active adapter, or the whole model where there is none, straight into a folder.

    Args:
        folder: an existing one; the files lie flat in it, whatever the adapter's name.
        model: a peft model, or a transformers model.
        flat: without subfolders for rows of new tokens and for weights under virtual tokens, which a
            checkpoint cannot hold; ftlib reads both.
    """
    with quiet(), evaluation_mode(model):  # what encodes virtual tokens runs to be saved
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder)
            return
        name = model.active_adapter
        converted = None if beneath(model, name) else converted_state(model, name)
        # peft would ask the hub whether the embeddings were resized: nothing here is named to be fetched
        model.save_pretrained(
            str(folder), selected_adapters=[name], save_embedding_layers=False, state_dict=converted
        )
    write_classes(folder, model)
    if name != "default":  # peft puts these one folder deeper
        for path in (folder / name).iterdir():
            path.replace(folder / path.name)
        (folder / name).rmdir()
    save_rows(folder, model, flat=flat)
    save_beneath(folder, model, flat=flat)
    write_place(folder, model)
    if converted is not None:
        convert_config(folder / _ADAPTER_CONFIG)


def _check_target(target: Path, *, adapted: bool) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"save: expected a folder, got the file {target}.")
    other = "config.json" if adapted else _ADAPTER_CONFIG
    if (target / other).exists():
        kinds = ("adapter", "whole model") if adapted else ("whole model", "adapter")
        raise ConfigError(
            f"save: expected a folder to hold the {kinds[0]}, got {target} with the {kinds[1]} of {other}. "
            "Loading it would mix the two; choose another folder."
        )


def _write_stops(folder: Path, model: PreTrainedModel, stop_ids: Sequence[int]) -> None:
    """Have generation stop where training did: a server reads this file, and none of ftlib's."""
    if not model.can_generate():
        return
    path = folder / _GENERATION_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else _settings(model)
    own = settings.get("eos_token_id")
    listed = own if isinstance(own, list) else [] if own is None else [own]
    stops = list(dict.fromkeys([*stop_ids, *listed]))
    settings["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    """How the model generates, which an adapter's folder otherwise leaves to its base."""
    return dict(model.generation_config.to_diff_dict())


def _describe_adapter(staging: Path, card: CardData) -> CardData:
    """Name the base in the saved adapter as others may read it, and complete the card."""
    parts = tuple(part for part in (NEW_TOKENS, BENEATH) if (staging / part).is_dir())
    base, kind = _describe_config(staging / _ADAPTER_CONFIG)
    kinds = {part: _describe_config(staging / part / _ADAPTER_CONFIG)[1] for part in parts}
    if BENEATH in kinds:
        kind = f"{kind} with {kinds[BENEATH]}"
    return replace(card, base=card.base or public_name(base), adapter=card.adapter or kind, parts=parts)


def _describe_config(path: Path) -> tuple[str | None, str]:
    """Name the base in a configuration as others may read it; that name, and the adapter in words."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base = _hub_name(config["base_model_name_or_path"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shape = ", ".join(f"{key}={config[key]}" for key in _SHAPE if config.get(key) is not None)
    return base, f"{config['peft_type']} ({shape})" if shape else str(config["peft_type"])


def _hub_name(base: str | None) -> str | None:
    """The hub's name of a base that was loaded from the hub's private cache; else the name as it is."""
    parts = Path(base or "").parts
    cached = [part for part in parts if part.startswith("models--")]
    if base and "snapshots" in parts and cached:
        return cached[0].removeprefix("models--").replace("--", "/")
    return base
