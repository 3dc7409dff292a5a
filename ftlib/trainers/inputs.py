"""What a trainer is given, turned into what it works with: model, tokenizer, encoded examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ftlib import adapters
from ftlib.adapters.attach import AnyModel, require_model
from ftlib.adapters.quantised import require_trainable
from ftlib.checks import Wanted, check
from ftlib.data.encode import Encoder
from ftlib.data.records import load_records
from ftlib.data.tokens import TOKENIZER
from ftlib.errors import ConfigError, DataError
from ftlib.models.encoders import first_position
from ftlib.models.load import AnyAdapter, load
from ftlib.models.parts import inner_model, language_task

__all__ = [
    "AnyAdapter",
    "check_comparisons",
    "check_encoder",
    "check_ids",
    "context_length",
    "count_comparisons",
    "encode",
    "is_encoded",
    "resolve_model",
    "tokenizer_beside",
]


@runtime_checkable
class _Encodes(Protocol):
    def encode_prompt(self, row: Any, /) -> list[int]: ...


ENCODER = Wanted("an ftlib.Encoder", lambda value: isinstance(value, _Encodes))
SHOWN = 20  # rows named in an error
ROWS_AT_A_TIME = 1000  # of which the ids are looked at


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

    Raises:
        CapabilityError: a quantised base without an adapter.
    """
    check("trainer", {"tokenizer": (tokenizer, TOKENIZER.or_none)})
    if isinstance(model, str | Path):
        made, found = load(model, adapter=adapter, task=task)
        return made, tokenizer or found
    require_model("trainer", model)
    tokenizer = tokenizer_beside(model) if tokenizer is None else tokenizer
    made = prepare(model, tokenizer)
    if adapter is None:
        require_trainable(made)
    return made if adapter is None else adapters.attach(made, adapter, tokenizer=tokenizer), tokenizer


def tokenizer_beside(model: nn.Module) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved beside the weights a model was loaded from, if there is one."""
    home = inner_model(model).name_or_path
    if not home or not (Path(home) / "tokenizer_config.json").is_file():
        return None
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(home)
    return tokenizer


def check_encoder(encoder: Encoder | None, model: AnyModel) -> Encoder | None:
    """The caller's encoder, which must lay prompts out for the kind of model that is trained.

    Raises:
        ConfigError: it is for the other kind.
    """
    check("trainer", {"encoder": (encoder, ENCODER.or_none)})
    task = language_task(model)
    if encoder is not None and encoder.task != task:
        raise ConfigError(
            f"trainer: expected an Encoder with task={task!r} for {type(inner_model(model)).__name__}, got "
            f"task={encoder.task!r}, whose prompts end otherwise. Make it with Encoder(tokenizer, "
            f"task={task!r})."
        )
    return encoder


def encode(
    data: Any, encoder: Callable[[], Encoder], limit: int | None, *, name: str, apart: bool = False
) -> Dataset | Sequence[Mapping[str, Any]]:
    """Encoded examples from records or from examples that are encoded already.

    Args:
        data: either.
        encoder: gives the encoder, if records need one.
        limit: the model's context, in tokens; None for none.
        name: of the argument, for errors.
        apart: prompt and completion have a context each, as in an encoder-decoder.

    Raises:
        ConfigError: a stream, which has no length to plan steps by.
        DataError: no examples, or examples longer than the model's context, all rows named.
    """
    if isinstance(data, IterableDataset):
        raise ConfigError(
            f"{name}: expected data with a length, got an IterableDataset. "
            "Take what you train on: Dataset.from_list(list(stream.take(n)))."
        )
    if not is_encoded(data):
        data = encoder()(data if isinstance(data, Dataset) else load_records(data))
    if len(data) == 0:
        raise DataError(f"{name}: expected at least one example, got none.", code="empty_data")
    _check_lengths(data, limit, name, apart=apart)
    return data


def is_encoded(data: Any) -> bool:
    """Whether these are encoded examples; else they are records."""
    if isinstance(data, Dataset):
        return "continuation_ids" in data.column_names
    return (
        isinstance(data, Sequence)
        and bool(data)
        and isinstance(data[0], Mapping)
        and "continuation_ids" in data[0]
    )


def _check_lengths(data: Any, limit: int | None, name: str, *, apart: bool) -> None:
    lengths = data["length"] if isinstance(data, Dataset) else [example["length"] for example in data]
    # a group of several continuations is longer than each of its sequences
    suspects = [index for index, length in enumerate(lengths) if limit is not None and length > limit]
    sequences = {index: _longest_sequence(data[index], apart=apart) for index in suspects}
    long = [index for index, length in sequences.items() if limit is not None and length > limit]
    if long:
        sources = [f"{data[index]['source']} ({sequences[index]} tokens)" for index in long[:SHOWN]]
        more = f" (+{len(long) - SHOWN} more)" if len(long) > SHOWN else ""
        raise DataError(
            f"{name}: expected examples within the model's context of {limit} tokens, got "
            f"{', '.join(sources)}{more}. Give an Encoder with max_length and an overflow policy.",
            code="too_long",
        )


def check_ids(data: Dataset | Sequence[Mapping[str, Any]], model: nn.Module, name: str) -> None:
    """Every token must have an embedding: beyond them an index error would end the run, or the device.

    Raises:
        DataError: the rows with others.
    """
    known = int(inner_model(model).config.get_text_config(decoder=True).vocab_size)
    wrong = _rows_beyond(data, known)
    if wrong:
        sources = [str(data[index]["source"]) for index in wrong[:SHOWN]]
        more = f" (+{len(wrong) - SHOWN} more)" if len(wrong) > SHOWN else ""
        raise DataError(
            f"{name}: expected tokens that the model has embeddings for, ids below {known}, got others in "
            f"{', '.join(sources)}{more}. Give the model's own tokenizer, or make room first: "
            "model.resize_token_embeddings(len(tokenizer)).",
            code="unknown_token",
        )


def check_comparisons(data: Dataset | Sequence[Mapping[str, Any]], name: str) -> None:
    """Every example must hold two answers or more: of a single one there is nothing to compare.

    Raises:
        DataError: the first one that does not.
    """
    for index, count in enumerate(_answers(data)):
        if count < 2:
            raise DataError(
                f"{name}: expected comparisons, rows with chosen and rejected or ranked answers, got "
                f"{count} answer in {data[index]['source']}. ftlib.SFTTrainer learns single answers.",
                code="no_comparison",
            )


def count_comparisons(data: Dataset | Sequence[Mapping[str, Any]]) -> int:
    """How many examples hold two answers or more."""
    return sum(count > 1 for count in _answers(data))


def _answers(data: Dataset | Sequence[Mapping[str, Any]]) -> Iterator[int]:
    """How many answers each example has; Arrow tells of a batch at a time."""
    if not isinstance(data, Dataset):
        yield from (len(row["continuation_ids"]) for row in data)
        return
    for table in data.select_columns("continuation_ids").with_format("arrow").iter(ROWS_AT_A_TIME):
        yield from pc.list_value_length(table["continuation_ids"]).to_pylist()


def _rows_beyond(data: Dataset | Sequence[Mapping[str, Any]], known: int) -> list[int]:
    """Indices of the examples with an id of `known` or more; Arrow tells of a batch at a time."""
    if not isinstance(data, Dataset):
        return [index for index, row in enumerate(data) if _largest_id(row) >= known]
    found: list[int] = []
    ids = data.select_columns(["prefix_ids", "continuation_ids"]).with_format("arrow")
    for number, table in enumerate(ids.iter(ROWS_AT_A_TIME)):
        flat = (pc.list_flatten(table["prefix_ids"]), _flat(table["continuation_ids"]))
        if any((pc.max(column).as_py() or 0) >= known for column in flat):
            rows = enumerate(table.to_pylist(), start=number * ROWS_AT_A_TIME)
            found += [index for index, row in rows if _largest_id(row) >= known]
    return found


def _flat(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.list_flatten(pc.list_flatten(lists))


def _largest_id(row: Mapping[str, Any]) -> int:
    return max(int(max(ids, default=0)) for ids in (row["prefix_ids"], *row.get("continuation_ids", ())))


def _longest_sequence(example: Mapping[str, Any], *, apart: bool) -> int:
    prompt, answer = len(example["prefix_ids"]), max(map(len, example["continuation_ids"]))
    return max(prompt, answer) if apart else prompt + answer


def context_length(model: AnyModel) -> int | None:
    """Most positions the model was built for; None where its config does not say."""
    text = inner_model(model).config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    taken = adapters.model_capabilities(model).virtual_tokens
    return None if limit is None else int(limit) - taken - first_position(inner_model(model))
