"""What a saved adapter may not contain, looked at before anything is built from it.

Weights come from safetensors only: pickles run code when read. A configuration may name code or kernels
to fetch, a kind that reads other files, or a size that no memory holds; all are refused. `load_adapter` is
the one way in, and runs this check; `ftlib.load` runs it before it reads a base, too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType
from safetensors import SafetensorError, safe_open

from ftlib.errors import CheckpointError, ConfigError

__all__ = [
    "BEHIND",
    "BENEATH",
    "NEW_TOKENS",
    "WEIGHTS",
    "check_adapter",
    "code_keys",
    "part_beside",
    "part_files",
    "read_json",
]

WEIGHTS = "adapter_model.safetensors"
BEHIND = " behind [CLS], where peft puts none: load it with ftlib.load(base, adapter=folder)"  # after a kind
# subfolders, or flat files, each with an adapter of its own
NEW_TOKENS = "new_tokens"  # rows of the tables
BENEATH = "weights"  # LoRA or IA3 under virtual tokens
_CONFIG = "adapter_config.json"
_CODE_KEYS = ("auto_map", "trust_remote_code", "custom_generate", "kernel_config", "use_kernels")
_EMPTY: tuple[object, ...] = (None, False, {}, [], "")
_MAX_CONFIG_BYTES = 16 * 2**20
_ADAPTER_LIBRARIES = ("transformers", "peft")
_KINDS = (  # all that these need is in their two files
    "LORA",
    "ADALORA",
    "IA3",
    "LOHA",
    "LOKR",
    "OFT",
    "BOFT",
    "HRA",
    "VERA",
    "LN_TUNING",
    "FOURIERFT",
    "TRAINABLE_TOKENS",
    "PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
)
_PARTS = {NEW_TOKENS: ("TRAINABLE_TOKENS",), BENEATH: ("LORA", "IA3")}
# of configurations that are known otherwise: a library to import, layers to multiply, statistics to unpickle
_REFUSED_KEYS = ("megatron_config", "layer_replication", "corda_config")


def check_adapter(folder: Path) -> None:
    """Refuse a saved adapter whose weights are pickled, absurdly large, or not finite.

    The base is always the caller's: what the folder names as its base is never read.

    Raises:
        ConfigError: not an adapter's folder, or a configuration that is refused.
        CheckpointError: weights that cannot be read, or hold NaN or infinity.
    """
    if not (folder / _CONFIG).is_file():
        raise ConfigError(f"load: expected a saved adapter, found no {_CONFIG} in {folder}.")
    _check(folder / _CONFIG, folder / WEIGHTS, _KINDS)
    for part, kinds in _PARTS.items():
        files = part_beside(folder, part)
        if files is not None:
            _check(*files, kinds)


def part_files(folder: Path, part: str, *, flat: bool) -> tuple[Path, Path]:
    """Configuration and weights of a part that is saved beside an adapter.

    Args:
        folder: the adapter's.
        part: `NEW_TOKENS` or `BENEATH`.
        flat: beside its files, as in a checkpoint; else in a folder of their own, which peft reads.
    """
    if flat:
        return folder / f"{part}.json", folder / f"{part}.safetensors"
    return folder / part / _CONFIG, folder / part / WEIGHTS


def part_beside(folder: Path, part: str) -> tuple[Path, Path] | None:
    """Those that are there; None where the adapter has none beside it."""
    for flat in (False, True):
        files = part_files(folder, part, flat=flat)
        if files[0].is_file():
            return files
    return None


def _check(config_path: Path, weights_path: Path, kinds: Sequence[str]) -> None:
    if not weights_path.is_file():
        raise ConfigError(
            f"load: expected {weights_path.name} in {weights_path.parent}, found none. Pickles (.bin) are "
            "not read."
        )
    config = read_json(config_path)
    _check_keys(config, config_path, kinds)
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
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
    for key, size in _sizes(config):
        if type(size) is not int or not 0 <= size <= largest:
            raise ConfigError(
                f"{config_path}: {key}: expected at most {largest}, the longest side of its weights, got "
                f"{size!r:.40}. Do not use this adapter."
            )


def _check_keys(config: dict[str, Any], path: Path, kinds: Sequence[str]) -> None:
    """Refuse a kind of adapter that is not known, and settings that its kind does not have."""
    kind = config.get("peft_type")
    if isinstance(kind, str):
        kind = kind.removesuffix(BEHIND)
    if kind not in kinds:
        raise ConfigError(
            f"{path}: peft_type: expected one of {', '.join(kinds)}, got {kind!r:.40}. If you trust it, load "
            "it with peft and give the model that this makes."
        )
    fields = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])}
    fields -= set(_REFUSED_KEYS)
    foreign = sorted(key for key, value in config.items() if key not in fields and value not in _EMPTY)
    foreign = [key for key in foreign if key not in _CODE_KEYS]  # which are named as what they are
    if foreign:
        raise ConfigError(
            f"{path}: expected settings of peft's {kind}, got {', '.join(map(repr, foreign[:5]))}. Take them "
            "out if you know that they change nothing; a newer peft may know more."
        )


def _sizes(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What decides how much memory is taken before the weights are read, by its key."""
    for key in ("r", "num_virtual_tokens", "token_dim", "num_layers"):
        yield key, config.get(key) or 0
    patterns = config.get("rank_pattern") or {}
    yield from (("r", rank) for rank in (patterns.values() if isinstance(patterns, dict) else [patterns]))
    if config.get("peft_type") == "PREFIX_TUNING":
        layers, width = (config.get(key) or 0 for key in ("num_layers", "token_dim"))
        whole = type(layers) is int and type(width) is int
        yield "2 num_layers token_dim", 2 * layers * width if whole else (layers, width)


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
            if names_repository or (key in _CODE_KEYS and item not in _EMPTY):
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
