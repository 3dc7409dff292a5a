"""What a trainer is given, turned into what it works with: model, tokenizer, encoded examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ftlib import adapters
from ftlib.adapters.attach import AnyModel
from ftlib.data.encode import Encoder
from ftlib.data.records import load_records
from ftlib.errors import ConfigError, DataError
from ftlib.models.load import AnyAdapter, load
from ftlib.models.parts import inner_model

__all__ = ["AnyAdapter", "context_length", "encode", "resolve_model"]

SHOWN = 20  # rows named in an error


def resolve_model(
    model: AnyModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    adapter: AnyAdapter | None,
    *,
    task: str,
    prepare: Callable[[AnyModel, PreTrainedTokenizerBase | None], AnyModel],
) -> tuple[AnyModel, PreTrainedTokenizerBase | None]:
    """A model to train and its tokenizer, from a loaded model or a name.

    A loaded model without a tokenizer gets the one saved beside its weights, if there is one.

    Args:
        model: a loaded one, or a name for `ftlib.load`.
        tokenizer: the caller's; None looks for one.
        adapter: attached to the model that `prepare` made; by `ftlib.load` to one given by name.
        task: of `ftlib.load`.
        prepare: makes the model to train of a loaded one.
    """
    if isinstance(model, str | Path):
        made, found = load(model, adapter=adapter, task=task)
        return made, tokenizer or found
    home = inner_model(model).name_or_path
    if tokenizer is None and home and (Path(home) / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(home)
    made = prepare(model, tokenizer)
    return made if adapter is None else adapters.attach(made, adapter), tokenizer


def encode(
    data: Any, encoder: Callable[[], Encoder], limit: int | None, *, name: str
) -> Dataset | Sequence[Mapping[str, Any]]:
    """Encoded examples from records or from examples that are encoded already.

    Raises:
        ConfigError: a stream, which has no length to plan steps by.
        DataError: no examples, or examples longer than the model's context, all rows named.
    """
    if isinstance(data, IterableDataset):
        raise ConfigError(
            f"{name}: expected data with a length, got an IterableDataset. "
            "Take what you train on: Dataset.from_list(list(stream.take(n)))."
        )
    if not _encoded(data):
        data = encoder()(data if isinstance(data, Dataset) else load_records(data))
    if len(data) == 0:
        raise DataError(f"{name}: expected at least one example, got none.", code="empty_data")
    _check_lengths(data, limit, name)
    return data


def _encoded(data: Any) -> bool:
    if isinstance(data, Dataset):
        return "continuation_ids" in data.column_names
    return (
        isinstance(data, Sequence)
        and bool(data)
        and isinstance(data[0], Mapping)
        and "continuation_ids" in data[0]
    )


def _check_lengths(data: Any, limit: int | None, name: str) -> None:
    lengths = data["length"] if isinstance(data, Dataset) else [example["length"] for example in data]
    # a group of several continuations is longer than each of its sequences
    suspects = [index for index, length in enumerate(lengths) if limit is not None and length > limit]
    sequences = {index: _longest_sequence(data[index]) for index in suspects}
    long = [index for index, length in sequences.items() if limit is not None and length > limit]
    if long:
        sources = [f"{data[index]['source']} ({sequences[index]} tokens)" for index in long[:SHOWN]]
        more = f" (+{len(long) - SHOWN} more)" if len(long) > SHOWN else ""
        raise DataError(
            f"{name}: expected examples within the model's context of {limit} tokens, got "
            f"{', '.join(sources)}{more}. Give an Encoder with max_length and an overflow policy.",
            code="too_long",
        )


def _longest_sequence(example: Mapping[str, Any]) -> int:
    return len(example["prefix_ids"]) + max(map(len, example["continuation_ids"]))


def context_length(model: AnyModel) -> int | None:
    """Most positions the model was built for; None where its config does not say."""
    text = inner_model(model).config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    return None if limit is None else int(limit)
