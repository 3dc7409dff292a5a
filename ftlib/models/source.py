"""Where a model's files are: a hub name, a folder or a GGUF file becomes one local folder.

Nothing after this knows the hub: the files are looked at before anything is built from them, and this
is the only place that reaches the network.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ftlib.checks import PATH, check
from ftlib.errors import CheckpointError, ConfigError, MissingPackageError
from ftlib.models.vetting import WEIGHTS, WEIGHTS_INDEX, check_model_files, weight_files

__all__ = ["Source", "find_source"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]  # configuration and tokenizer


@final
@dataclass(frozen=True)
class Source:
    """A model's files on this machine, looked at and found safe to read.

    Args:
        folder: holds config and weights, or the GGUF file.
        gguf_file: name of the GGUF file in the folder; None for safetensors.
        name: what the caller called it, for configs that others read.
        loading: more arguments of transformers' `from_pretrained`, such as how to quantise.
    """

    folder: Path
    gguf_file: str | None
    name: str
    loading: Mapping[str, Any] = field(default_factory=dict)


def find_source(
    name_or_path: str | Path,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> Source:
    """Find a model, fetch it if it is a hub name, and look at its files.

    Raises:
        ConfigError: nothing there, options that clash, or files that are refused.
        MissingPackageError: a GGUF file without the package that reads it.
    """
    check("load", {"name_or_path": (name_or_path, PATH)})
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf":
        if gguf_file is not None:
            raise ConfigError(f"load: {path} is a GGUF file already. Leave out gguf_file={gguf_file!r}.")
        path, gguf_file, name = path.parent, path.name, str(path)
        if not (path / gguf_file).is_file():
            raise ConfigError(f"load: expected a GGUF file, found none at {name}. Check the path.")
    else:
        name = str(name_or_path)
    if path.is_dir():
        if revision is not None:
            raise ConfigError(f"load: revision={revision!r} has no effect on a folder, {path}. Leave it out.")
        folder = path
    elif path.is_file():
        raise ConfigError(
            f"load: expected a model's folder, a GGUF file or a hub name, got the file {path}. "
            "Weights are read from safetensors and GGUF only; give the folder that holds them."
        )
    elif isinstance(name_or_path, Path) or not _HUB_NAME.fullmatch(name):
        raise ConfigError(f"load: expected a folder, a GGUF file or a hub name, found nothing at {name}.")
    else:
        small = _SMALL_FILES + (["*.py"] if trust_remote_code else [])
        patterns = [gguf_file] if gguf_file else small
        folder = _fetch(name, patterns, revision, token, local_files_only)
        if gguf_file is None:  # the small files are looked at before any large one is fetched
            check_model_files(folder, name, trust_remote_code=trust_remote_code)
            wanted = weight_files(folder, name) if (folder / WEIGHTS_INDEX).is_file() else [WEIGHTS]
            folder = _fetch(name, small + wanted, revision, token, local_files_only)
    if gguf_file is None:
        check_model_files(folder, name, trust_remote_code=trust_remote_code)
        missing = [file for file in weight_files(folder, name) if not (folder / file).is_file()]
        if missing:
            raise CheckpointError(f"load: expected {missing[:3]} in {folder}, not found. Copy them again.")
    else:
        _check_gguf(folder, gguf_file)
    return Source(folder, gguf_file, name)


def _fetch(
    name: str, patterns: list[str], revision: str | None, token: str | bool | None, local_files_only: bool
) -> Path:
    """The hub's folder of a model in the local cache, with the files that match."""
    where = "the local cache (local_files_only)" if local_files_only else "the local cache or the hub"
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=patterns,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"load: expected a folder or a hub name, found no folder {name!r} and no such model in {where}, "
            f"revision {revision or 'main'!r} ({type(error).__name__}). Check name, access and network."
        ) from error


def _check_gguf(folder: Path, gguf_file: str) -> None:
    path = folder / gguf_file
    if not path.is_file():
        raise ConfigError(f"load: expected the GGUF file {gguf_file!r} in {folder}, found none.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ConfigError(f"load: expected a GGUF file at {path}, which starts with b'GGUF', got {magic!r}.")
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackageError("load: a GGUF file needs the package gguf: pip install 'ftlib[gguf]'.")
