"""What a saved adapter may not contain, looked at before anything is built from it.

Weights come from safetensors only: pickles run code when read. A configuration may name code or kernels
to fetch, or a size that no memory holds; both are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ftlib.errors import CheckpointError, ConfigError

__all__ = ["WEIGHTS", "check_adapter", "code_keys", "read_json"]

WEIGHTS = "adapter_model.safetensors"
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_generate", "kernel_config", "use_kernels")
_MAX_CONFIG_BYTES = 16 * 2**20
_ADAPTER_LIBRARIES = ("transformers", "peft")


def check_adapter(folder: Path) -> None:
    """Refuse a saved adapter whose weights are pickled, absurdly large, or not finite.

    The base is always the caller's: what the folder names as its base is never read.

    Raises:
        ConfigError: not an adapter's folder, or a configuration that is refused.
        CheckpointError: weights that cannot be read, or hold NaN or infinity.
    """
    config_path, weights_path = folder / "adapter_config.json", folder / WEIGHTS
    if not config_path.is_file():
        raise ConfigError(f"load: expected a saved adapter, found no adapter_config.json in {folder}.")
    if not weights_path.is_file():
        raise ConfigError(f"load: expected {WEIGHTS} in {folder}, found none. Pickles (.bin) are not read.")
    config = read_json(config_path)
    library = (config.get("auto_mapping") or {}).get("parent_library")
    if library is not None and str(library).split(".")[0] not in _ADAPTER_LIBRARIES:
        raise ConfigError(
            f"{config_path}: parent_library: expected one of {_ADAPTER_LIBRARIES}, got {library!r}."
        )
    keys = sorted(set(code_keys(config)))
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


def code_keys(value: Any) -> Iterator[str]:
    """The keys, at any depth, that make transformers fetch or run code."""
    if isinstance(value, dict):
        for key, item in value.items():
            names_repository = "_implementation" in key and "/" in json.dumps(item, default=str)
            if names_repository or (key in _CODE_KEYS and item not in (None, False, {}, [])):
                yield key
            yield from code_keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from code_keys(item)


def read_json(path: Path, *, most_bytes: int | None = _MAX_CONFIG_BYTES) -> dict[str, Any]:
    """An object from a JSON file.

    Args:
        path: of the file.
        most_bytes: a longer file is refused; None takes any.

    Raises:
        ConfigError: unreadable, too long, or no object.
    """
    try:
        if most_bytes is not None and path.stat().st_size > most_bytes:
            raise ValueError(f"{path.stat().st_size:,} bytes, more than {most_bytes:,}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: expected a JSON file, got {error}.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(value).__name__}.")
    return value
