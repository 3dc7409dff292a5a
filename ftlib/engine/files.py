"""Files of a checkpoint: tensors as safetensors, everything else as JSON, and getting both onto the disk.

Left out on purpose: pickle, in any form. What JSON and safetensors cannot hold is refused by name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ftlib.errors import CheckpointError

__all__ = ["fsync_file", "fsync_folder", "load_state", "load_tensors", "save_state", "save_tensors", "sha256"]

MAX_JSON_BYTES = 256 * 2**20  # a state with the history of a million logged steps stays below this


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors: bits, dtypes and shapes are kept, devices are not.

    Args:
        path: file to write, normally ending in ``.safetensors``.
        tensors: name -> tensor of any shape, dtype and device. Views and shared storage are copied.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    owned: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        owned[name] = plain.clone() if storage in storages else plain  # the format refuses aliases
        storages.add(storage)
    save_file(owned, path)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote, onto the CPU.

    Raises:
        CheckpointError: missing, truncated, or not safetensors.
    """
    try:
        return load_file(path, device="cpu")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: expected a safetensors file, got {error}. Use another checkpoint."
        ) from error


def save_state(path: str | Path, state: Mapping[str, Any], *, indent: int | None = None) -> None:
    """Write plain values as JSON; floats round-trip bit for bit, NaN and infinities as Python spells them.

    Args:
        path: file to write, normally ``state.json``.
        state: nested dicts with string keys, lists, tuples (read back as lists), strings, numbers,
            booleans and None.
        indent: spaces per level, for files that people read.

    Raises:
        CheckpointError: a value of another type; the message gives its place.
        OSError: the file cannot be written.
    """
    text = json.dumps(_plain(state, Path(path).name), ensure_ascii=False, indent=indent)
    Path(path).write_text(text + "\n", encoding="utf-8", errors="surrogatepass")


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        CheckpointError: missing, truncated, oversized, or not a JSON object.
    """
    try:
        size = Path(path).stat().st_size
        if size > MAX_JSON_BYTES:
            raise ValueError(f"{size:,} bytes, more than the {MAX_JSON_BYTES:,} allowed")
        value = json.loads(Path(path).read_bytes().decode("utf-8", "surrogatepass"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: expected a JSON file, got {error}. Use another checkpoint."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, got {type(value).__name__}. Use another checkpoint."
        )
    return value


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_file(path: Path) -> None:
    """Have the file's bytes on the disk before returning."""
    _fsync(path, os.O_RDWR)  # some systems refuse to flush what is open for reading only


def fsync_folder(path: Path) -> bool:
    """Have the folder's entries on the disk before returning; False where the platform cannot.

    Raises:
        OSError: the platform can, and it failed.
    """
    try:
        _fsync(path, os.O_RDONLY)
    except OSError as error:
        unsupported = error.errno in (errno.EINVAL, errno.ENOTSUP)
        if unsupported or (os.name == "nt" and isinstance(error, PermissionError)):
            return False
        raise
    return True


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any, where: str) -> Any:
    """The value with tuples as lists; refuses what JSON would change or cannot hold."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str:
                raise CheckpointError(f"{where}: expected string keys, got {key!r}. Write it as text.")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    hint = "Keep tensors in a safetensors file" if isinstance(value, torch.Tensor) else "Convert it first"
    raise CheckpointError(f"{where}: expected plain JSON values, got {type(value).__name__}. {hint}.")
