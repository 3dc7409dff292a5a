"""What a downloaded model may not contain, looked at before anything is built from it.

Weights come from safetensors only: `.bin`, `.pt` and `.pth` are pickles, which run code when read. A
configuration may name code or kernels to fetch; those keys are refused unless the caller trusts them.
"""

from __future__ import annotations

from pathlib import Path

from ftlib.adapters.vetting import code_keys, read_json
from ftlib.errors import ConfigError

__all__ = ["WEIGHTS", "WEIGHTS_INDEX", "check_model_files", "weight_files"]

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


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
        keys = sorted(set(code_keys(read_json(folder / file))))
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
        index = read_json(folder / WEIGHTS_INDEX, most_bytes=None)
        files = sorted(set(map(str, index.get("weight_map", {}).values())))
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
