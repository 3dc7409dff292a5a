"""What a downloaded model or adapter may not contain, looked at before anything is built from it.

Weights come from safetensors only: `.bin`, `.pt` and `.pth` are pickles, which run code when read. A
configuration may name code or kernels to fetch; those keys are refused unless the caller trusts them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ftlib.errors import CheckpointError, ConfigError

__all__ = ["WEIGHTS", "WEIGHTS_INDEX", "check_adapter", "check_model_files", "weight_files"]

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_generate", "kernel_config", "use_kernels")
_MAX_CONFIG_BYTES = 16 * 2**20
_ADAPTER_LIBRARIES = ("transformers", "peft")


def check_model_files(folder: Path, name: str, *, trust_remote_code: bool) -> None:
    """Refuse a folder that is no model, or whose configuration names code to run.

    Raises:
        ConfigError: naming the file and the key.
    """
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"load: expected a model at {name}, got a saved adapter. Load its base with adapter={name!r}."
            )
        raise ConfigError(f"load: expected config.json at {name}, found none. Give a model's folder or name.")
    for file in _CONFIGS:
        if not (folder / file).is_file():
            continue
        keys = sorted(set(_code_keys(_read_json(folder / file))))
        if keys and not trust_remote_code:
            raise ConfigError(
                f"{folder / file}: expected plain settings, got {', '.join(map(repr, keys))}: code to run. "
                "Remove it to use transformers' own class, or pass trust_remote_code=True if you trust it."
            )


def weight_files(folder: Path, name: str) -> list[str]:
    """Names of the safetensors files of a model, from its index if it is sharded.

    Raises:
        ConfigError: only pickled weights, or an index that leaves the folder.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / WEIGHTS_INDEX).is_file():
        files = sorted(set(map(str, _read_json(folder / WEIGHTS_INDEX).get("weight_map", {}).values())))
        foreign = [file for file in files if Path(file).name != file or "\\" in file or "\0" in file]
        if foreign or not files:
            raise ConfigError(
                f"{folder / WEIGHTS_INDEX}: expected names of files in its own folder, got {foreign[:3]}. "
                "Do not use this model."
            )
        return files
    pickled = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    found = f"{pickled[0]}, a pickle, which can run code" if pickled else "none"
    raise ConfigError(
        f"load: expected {WEIGHTS} at {name}, found {found}. Give a model with safetensors weights, or "
        "convert it once in a sandbox: model.save_pretrained(folder)."
    )


def check_adapter(folder: Path) -> None:
    """Refuse a saved adapter whose weights are pickled, absurdly large, or not finite.

    The base is always the caller's: what the folder names as its base is never read.

    Raises:
        ConfigError: not an adapter's folder, or a configuration that is refused.
        CheckpointError: weights that cannot be read, or hold NaN or infinity.
    """
    config_path, weights_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_path.is_file():
        raise ConfigError(f"load: expected a saved adapter, found no adapter_config.json in {folder}.")
    if not weights_path.is_file():
        raise ConfigError(
            f"load: expected {weights_path.name} in {folder}, found none. Pickles (.bin) are not read."
        )
    config = _read_json(config_path)
    library = (config.get("auto_mapping") or {}).get("parent_library")
    if library is not None and str(library).split(".")[0] not in _ADAPTER_LIBRARIES:
        raise ConfigError(
            f"{config_path}: parent_library: expected one of {_ADAPTER_LIBRARIES}, got {library!r}."
        )
    keys = sorted(set(_code_keys(config)))
    if keys:
        raise ConfigError(f"{config_path}: expected plain settings, got {', '.join(map(repr, keys))}.")
    try:
        largest = _scan(weights_path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights_path}: expected safetensors, got {error}. Copy it again.") from error
    ranks = [config.get("r") or 0, *(config.get("rank_pattern") or {}).values()]
    if max(map(int, ranks)) > largest:
        raise ConfigError(
            f"{config_path}: r: expected at most {largest}, the longest side of its weights, got {max(ranks)}"
        )


def _scan(weights_path: Path) -> int:
    """The largest side of any tensor; refuses values that are not finite."""
    largest = 0
    with safe_open(weights_path, framework="pt", device="cpu") as file:
        for key in file.keys():  # noqa: SIM118  not a mapping
            tensor = file.get_tensor(key)
            largest = max(largest, *tensor.shape) if tensor.ndim else largest
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{weights_path}: {key}: expected finite values, got NaN or infinity.")
    return largest


def _code_keys(value: Any) -> Iterator[str]:
    """The keys, at any depth, that make transformers fetch or run code."""
    if isinstance(value, dict):
        for key, item in value.items():
            names_repository = "_implementation" in key and "/" in json.dumps(item, default=str)
            if names_repository or (key in _CODE_KEYS and item not in (None, False, {}, [])):
                yield key
            yield from _code_keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _code_keys(item)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES and path.name != WEIGHTS_INDEX:
            raise ValueError(f"{path.stat().st_size:,} bytes, more than {_MAX_CONFIG_BYTES:,}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected a JSON file, got {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value
