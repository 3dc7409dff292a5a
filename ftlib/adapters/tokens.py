"""New tokens: their rows of both embedding tables are trained and saved with any adapter.

A model with an output table of its own would otherwise learn to read a new token and never to write it.

peft trains such rows for every configuration that has the attribute ``trainable_token_indices``, but only
LoRA's declares and saves it. Rows beside another adapter are therefore an adapter of their own when saved,
peft's TRAINABLE_TOKENS in the subfolder `NEW_TOKENS`. Plain peft reads the two one after the other:

    base = PeftModel.from_pretrained(base, folder / "new_tokens").merge_and_unload()
    model = PeftModel.from_pretrained(base, folder)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TrainableTokensConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper, set_additional_trainable_modules
from safetensors.torch import load, load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftlib.adapters.vetting import NEW_TOKENS, WEIGHTS, part_beside, part_files, read_json
from ftlib.checks import NATURAL, listed
from ftlib.errors import CheckpointError, ConfigError

__all__ = [
    "fit_new_tokens",
    "grow_for_tokens",
    "is_row",
    "load_rows",
    "move_new_tokens",
    "read_rows_here",
    "save_rows",
    "saved_tokens",
    "with_new_tokens",
]

_FIELD = "trainable_token_indices"  # of peft's configurations
_WRAPPED = ".token_adapter."  # in the names of the rows that a wrapped table holds
_ROWS = ".trainable_tokens_delta"  # of a table, in a saved adapter
_PREFIX = "base_model.model."  # of all names in one


def with_new_tokens(config: PeftConfig, ids: Sequence[int] | None, adapter: str) -> None:
    """Let a configuration train the rows of new tokens; None adds none.

    Args:
        config: of any kind, changed in place.
        ids: of the tokens.
        adapter: who asks, for errors.

    Raises:
        ConfigError: anything but ids.
    """
    if ids is None:
        return
    if not listed("ids", NATURAL.holds, least=1).holds(ids):
        raise ConfigError(
            f"{adapter}: expected new_tokens as ids, got {ids!r:.60}. Look them up: "
            "tokenizer.convert_tokens_to_ids(words)."
        )
    cast(Any, config).trainable_token_indices = sorted(set(ids))


def move_new_tokens(source: PeftConfig, target: PeftConfig) -> None:
    """Let a configuration train the new tokens of another one besides its own; that one no longer does."""
    own = [getattr(config, _FIELD, None) for config in (source, target)]
    ids = [one for each in own for one in each or ()]
    if ids:
        with_new_tokens(target, ids, "stack")
        cast(Any, source).trainable_token_indices = None


def is_row(key: str) -> bool:
    """Whether a key of a peft model's state is of rows of new tokens."""
    return _WRAPPED in key


def fit_new_tokens(config: PeftConfig, model: PreTrainedModel | PeftModel) -> None:
    """Name both tables in a configuration that lists ids of tokens; any other one is left alone.

    Raises:
        ConfigError: ids that the tables have no rows for.
    """
    ids: Any = getattr(config, _FIELD, None)
    if not isinstance(ids, list):
        return
    inner = _inner(model)
    read = inner.get_input_embeddings()
    rows = cast(Tensor, read.weight).shape[0]
    if max(ids) >= rows or min(ids) < 0:
        raise ConfigError(
            f"attach: expected new_tokens below {rows}, the rows of the embedding table, got {max(ids)}. "
            "Make room first: model.resize_token_embeddings(len(tokenizer))."
        )
    written = inner.get_output_embeddings()
    apart = written is not None and cast(Any, written).weight is not read.weight
    tables = [read, written] if apart else [read]  # peft lets a tied table follow
    names = {id(module): name for name, module in inner.named_modules()}
    cast(Any, config).trainable_token_indices = {names[id(table)]: ids for table in tables}


def saved_tokens(folder: Path) -> list[int]:
    """Ids of the tokens whose rows a saved adapter trained.

    Raises:
        ConfigError: anything but ids.
    """
    listed: Any = read_json(folder / "adapter_config.json").get(_FIELD) or {}
    rows = part_beside(folder, NEW_TOKENS)
    if rows is not None:
        listed = read_json(rows[0]).get("token_indices") or {}
    tables = listed.values() if isinstance(listed, dict) else [listed]
    ids = [one for each in tables for one in (each if isinstance(each, list) else [each])]
    if not all(type(one) is int for one in ids):
        raise ConfigError(f"{folder}: {_FIELD}: expected ids of tokens, got {listed!r:.60}. Save it again.")
    return sorted(set(ids))


def grow_for_tokens(folder: Path, model: PreTrainedModel | PeftModel) -> None:
    """Give a base the rows that a saved adapter trains; their content is the adapter's own.

    Raises:
        ConfigError: ids far beyond the base's vocabulary, which would take any amount of memory.
    """
    ids, inner = saved_tokens(folder), _inner(model)
    rows = cast(Tensor, inner.get_input_embeddings().weight).shape[0]
    if ids and not (min(ids) >= 0 and max(ids) < 2 * rows):
        raise ConfigError(
            f"{folder}: expected new tokens within twice the {rows} rows of this base, got ids {ids[0]} to "
            f"{ids[-1]}. Load the adapter on the base it was trained on."
        )
    if ids and max(ids) >= rows:
        with torch.random.fork_rng(devices=[]):
            inner.resize_token_embeddings(max(ids) + 1, mean_resizing=False)


def read_rows_here(model: PeftModel) -> None:
    """Let peft's own forward of virtual tokens read the adapted table, not the one inside it."""
    if not model.active_peft_config.is_prompt_learning:
        return
    table: nn.Module = _inner(model).get_input_embeddings()
    if isinstance(table, TrainableTokensWrapper | BaseTunerLayer):
        model.word_embeddings = table


def save_rows(folder: Path, model: PeftModel, *, flat: bool = False) -> None:
    """Move the rows in a folder that peft wrote into an adapter of their own, unless it is LoRA's.

    Args:
        folder: with the active adapter.
        model: whose adapter it is.
        flat: see `part_files`.
    """
    name = str(model.active_adapter)
    config = model.peft_config[name]
    tables = dict(_tables(model, name))
    if not tables or hasattr(type(config), _FIELD):
        return
    written = load((folder / WEIGHTS).read_bytes())  # not mapped: the file is written anew
    kept = {key: value for key, value in written.items() if not is_row(key)}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    config_path, weights_path = part_files(folder, NEW_TOKENS, flat=flat)
    config_path.parent.mkdir(exist_ok=True)
    beside = TrainableTokensConfig(
        base_model_name_or_path=config.base_model_name_or_path,
        task_type=config.task_type,
        token_indices=next(iter(cast(Any, config).trainable_token_indices.values())),
        target_modules=list(tables),
        inference_mode=True,
    )
    config_path.write_text(json.dumps(beside.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    rows = {f"{_PREFIX}{where}{_ROWS}": rows.detach().cpu().contiguous() for where, rows in tables.items()}
    save_file(rows, weights_path, metadata={"format": "pt"})


def load_rows(folder: Path, model: PeftModel, name: str) -> None:
    """Give a loaded adapter the rows that were saved beside it.

    Raises:
        CheckpointError: rows of other tables, or another number of them.
    """
    files = part_beside(folder, NEW_TOKENS)
    if files is None:
        return
    saved = load_file(files[1])
    found = {key.removeprefix(_PREFIX).removesuffix(_ROWS): rows for key, rows in saved.items()}
    ids, inner = saved_tokens(folder), _inner(model)
    tables = dict.fromkeys(found, ids)
    cast(Any, model.peft_config[name]).trainable_token_indices = tables
    beside = LoraConfig(trainable_token_indices=tables)  # nothing but the rows
    known = {where for where, _ in inner.named_modules()}
    if known >= found.keys():
        set_additional_trainable_modules(inner, beside, BaseTuner.get_model_config(inner), name)
    own = dict(_tables(model, name))
    shapes = [{where: tuple(rows.shape) for where, rows in each.items()} for each in (own, found)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(
            f"{files[1]}: expected rows of the tables of this base, got {shapes[1]}. Load the "
            "adapter on the base it was trained on."
        )
    with torch.no_grad():
        for where, rows in own.items():
            rows.copy_(found[where])


def _tables(model: PeftModel, name: str) -> Iterator[tuple[str, Tensor]]:
    """The rows that an adapter trains, by the name of their table; a tied table has none of its own."""
    for where, module in _inner(model).named_modules():
        if isinstance(module, TrainableTokensWrapper) and module.token_adapter.tied_adapter is None:
            held = module.token_adapter.trainable_tokens_delta
            if name in held:
                yield where, held[name]


def _inner(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
