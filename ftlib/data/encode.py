"""Records to token ids with one loss weight per token. Data sets, caching and reporting; the rows
themselves are encoded in `ftlib.data.rows`.

Each example is a prefix and its continuations (see `ftlib.batches.Group`), ids unshifted, weights
aligned with ids.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any, final, get_args

import datasets
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ftlib.data import formatters
from ftlib.data.preview import Preview, preview_row
from ftlib.data.problems import gathered
from ftlib.data.records import load_records
from ftlib.data.report import Report
from ftlib.data.rows import Example, Overflow, RowEncoder
from ftlib.data.segments import Conversation, Formatter, Row, Segments, TrainOn
from ftlib.data.templates import ChatTemplate
from ftlib.data.tokens import TokenBackend
from ftlib.data.weights import check
from ftlib.errors import ConfigError, DataError

__all__ = ["COLUMNS", "Encoder"]

_log = logging.getLogger(__name__)

COLUMNS = Features(
    {
        "prefix_ids": List(Value("int32")),
        "prefix_weights": List(Value("float32")),
        "continuation_ids": List(List(Value("int32"))),
        "continuation_weights": List(List(Value("float32"))),
        "length": Value("int32"),
        "source": Value("string"),
    }
)
# Beside each example travels what became of it, so that workers and caches can report.
_STATUS = Features(
    {
        "problem": Value("string"),
        "dropped": Value("string"),
        "notes": List(Value("string")),
        "trained": Value("int32"),
        "first": Value("bool"),
    }
)
_STREAM_BATCH = 64  # rows encoded ahead of the reader of a stream

AnyFormatter = Formatter | Callable[[Row], Segments | Conversation]


@final
class Encoder:
    """Encodes records for one tokenizer. It works on a private copy; the tokenizer is never changed.

    Args:
        tokenizer: any transformers tokenizer with a fast backend.
        formatter: row -> `Segments` or `Conversation`; `None` picks one by the columns: `messages`,
            `prompt` and `completion` (strings or message lists), or `text`.
        train_on: what is learned. ``"completion"``: the completion with its terminator, all of a text,
            every assistant turn of `messages`. ``"assistant"``: every assistant turn, those of the prompt
            included. ``"last"``: only a final assistant turn. ``"all"``: every token. ``"weighted"``:
            messages by their `weight`, otherwise assistant turns. A function: `Segments` -> one weight
            per part. Message weights multiply every preset.
        prompt_loss_weight: loss weight of prompt tokens, >= 0.
        max_length: tokens per example; `None` leaves length alone.
        overflow: for longer examples: ``"error"``, ``"drop"``, ``"truncate_prompt"`` (from the left, a BOS
            stays) or ``"truncate"`` (from the right; a terminator that is cut is not put back).

    Raises:
        ConfigError: unknown options, or options without effect.
        CapabilityError: a tokenizer without a fast backend.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        formatter: AnyFormatter | None = None,
        train_on: TrainOn = "completion",
        prompt_loss_weight: float = 0.0,
        max_length: int | None = None,
        overflow: Overflow = "error",
    ) -> None:
        check(train_on, prompt_loss_weight)
        if overflow not in get_args(Overflow):
            raise ConfigError(
                f"Encoder: expected overflow as one of {list(get_args(Overflow))}, got {overflow!r}."
            )
        if max_length is None and overflow != "error":
            raise ConfigError(f"Encoder: overflow={overflow!r} has no effect without max_length. Give both.")
        if max_length is not None and max_length < 1:
            raise ConfigError(f"Encoder: expected max_length >= 1, got {max_length}.")
        self.formatter = formatter
        self.train_on = train_on
        self.prompt_loss_weight = prompt_loss_weight
        self.max_length = max_length
        self.overflow = overflow
        self.report = Report()
        self._backend = TokenBackend(tokenizer)
        self._template = ChatTemplate(self._backend.tokenizer, self._backend.control)
        self._resolved = formatter

    def __call__(self, records: Any, *, num_proc: int | None = None) -> Any:
        """Encode records. `report` then tells about this call.

        Args:
            records: records, anything `load_records` takes, or an `IterableDataset`.
            num_proc: worker processes; the result does not depend on it.

        Returns:
            A `Dataset` with `COLUMNS`, cached under a fingerprint of every input; of an
            `IterableDataset`, another one, whose report grows as it is read.

        Raises:
            DataError: every bad row at once: nothing to train (``empty_target``), too long
                (``too_long``), a template that fails (``template``).
        """
        records = self._records(records)
        worker = _Worker(self._rows(_first(records)))
        if isinstance(records, IterableDataset):
            return self._stream(records, worker)
        fingerprint = self._fingerprint(records, worker.rows.formatter)
        encoded = records.with_format(None).map(
            worker,
            batched=True,
            with_indices=True,
            num_proc=num_proc,
            remove_columns=records.column_names,
            features=Features({**COLUMNS, **_STATUS}),
            new_fingerprint=fingerprint,
            cache_file_name=_cache_file(records, fingerprint),
            desc="Encoding",
        )
        self.report = Report()
        status = encoded.select_columns(["length", "source", *_STATUS])
        _count(self.report, status)
        if self.report.rows != len(records):
            raise AssertionError(
                f"encoder: {len(records)} rows came in, {self.report.rows} are accounted for."
            )
        if self.report.dropped:
            encoded = encoded.select([i for i, reason in enumerate(status["dropped"]) if reason is None])
        if flags := self.report.flags():
            _log.warning("Encoder: %s. encoder.preview(records) shows it.", "; ".join(flags))
        return encoded.remove_columns(list(_STATUS))

    def preview(self, records: Any, n: int = 3) -> Preview:
        """The first `n` rows as the model gets them, trained tokens marked."""
        records = self._records(records)
        rows = list(islice(iter(records), n))
        examples = self._rows(_first(records)).encode(rows, range(len(rows)))
        _raise_problems(example.problem for example in examples)
        stops = frozenset(self.stop_ids)
        return Preview(tuple(preview_row(example, self._backend, stops) for example in examples))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The token ids that end what is trained, ascending: EOS, or the stop tokens of the template.

        Both, as long as no formatter was given and no records were seen.
        """
        return tuple(sorted(self._stop_ids(self._resolved)))

    def encode_prompt(self, row: str | Sequence[Mapping[str, Any]] | Row) -> list[int]:
        """Exactly the ids that inference puts before the completion, the prefix ids of training.

        Args:
            row: a row as in the data, with or without its completion; a message list; or a bare prompt,
                which goes through the formatter of the last call (`prompt_completion` before any).
        """
        if isinstance(row, str):
            formatter = self._resolved or formatters.prompt_completion()
            row = formatter.row(row) if isinstance(formatter, Formatter) else {"prompt": row}
        elif not isinstance(row, Mapping):
            row = {"prompt": list(row)}
        formatter = self.formatter or _formatter_of(row)
        return self._row_encoder(formatter).prompt_ids(row)

    def _records(self, records: Any) -> Dataset | IterableDataset:
        """Data sets with `_source`, or whose columns the user's formatter knows, are taken as they are."""
        if isinstance(records, IterableDataset):
            return records
        if isinstance(records, Dataset):
            if self.formatter is not None or "_source" in records.column_names:
                if not len(records):
                    raise DataError("expected at least one record, got none.", code="empty_data")
                return records
            return load_records(records)
        return load_records(records, format="auto" if self.formatter is None else "rows")

    def _rows(self, first: Row) -> RowEncoder:
        self._resolved = self.formatter or _formatter_of(first)
        return self._row_encoder(self._resolved)

    def _row_encoder(self, formatter: AnyFormatter) -> RowEncoder:
        return RowEncoder(
            self._backend,
            self._template,
            formatter,
            self.train_on,
            self.prompt_loss_weight,
            self.max_length,
            self.overflow,
            frozenset(self._stop_ids(formatter)),
        )

    def _stop_ids(self, formatter: AnyFormatter | None) -> set[int]:
        eos = set() if self._backend.eos_id is None else {self._backend.eos_id}
        if formatter is not None and not isinstance(formatter, formatters.Chat):
            return eos
        template = formatter.template if isinstance(formatter, formatters.Chat) else None
        stops = self._template.stop_tokens(template)
        vocabulary = self._backend.tokenizer.get_added_vocab()
        found = {vocabulary[token] for token in stops}
        return found | eos if formatter is None else found or eos

    def _stream(self, records: IterableDataset, worker: _Worker) -> IterableDataset:
        report = self.report = Report()
        columns = records.column_names or list(_first(records))

        def encode(batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
            encoded = worker(batch, indices)
            rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
            _count(report, rows)
            return {name: [row[name] for row in rows if row["dropped"] is None] for name in COLUMNS}

        return records.map(
            encode,
            batched=True,
            batch_size=_STREAM_BATCH,
            with_indices=True,
            remove_columns=columns,
            features=COLUMNS,
        )

    def _fingerprint(self, records: Dataset, formatter: AnyFormatter) -> str:
        """Changes with everything that changes the result: code, tokenizer, template, options, source."""
        inputs = [
            _code_fingerprint(),
            self._backend.fingerprint,
            _identity(formatter),
            _identity(self.train_on),
            repr(self.prompt_loss_weight),
            repr(self.max_length),
            self.overflow,
            records._fingerprint,
        ]
        return hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()


@final
@dataclass(frozen=True)
class _Worker:
    """A batch of columns to a batch of encoded columns; what `datasets.map` runs."""

    rows: RowEncoder

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        examples = [_columns(example) for example in self.rows.encode(rows, indices)]
        return {name: [example[name] for example in examples] for name in (*COLUMNS, *_STATUS)}


def _columns(example: Example) -> dict[str, Any]:
    problem = example.problem
    return {
        "prefix_ids": example.prefix[0],
        "prefix_weights": example.prefix[1],
        "continuation_ids": [example.rest[0]],
        "continuation_weights": [example.rest[1]],
        "length": example.length,
        "source": example.source,
        "problem": None
        if problem is None
        else json.dumps(
            {
                "message": problem.message,
                "code": problem.code,
                "file": problem.file,
                "row": problem.row,
                "column": problem.column,
                "byte": problem.byte,
                "excerpt": problem.excerpt,
            }
        ),
        "dropped": example.dropped,
        "notes": list(example.notes),
        "trained": example.trained,
        "first": example.first,
    }


def _count(report: Report, status: Iterable[Mapping[str, Any]]) -> None:
    """Add encoded examples to a report; raise the problems among them."""
    problems = []
    for example in status:
        if example["problem"] is not None:
            problems.append(DataError(**json.loads(example["problem"])))
            continue
        report.add(
            length=example["length"],
            trained=example["trained"],
            dropped=example["dropped"],
            notes=example["notes"],
            first=example["first"],
        )
    _raise_problems(problems)
    report.check()


def _raise_problems(problems: Iterable[DataError | None]) -> None:
    found = [problem for problem in problems if problem is not None]
    if found:
        raise gathered(found)


def _first(records: Dataset | IterableDataset) -> Row:
    row = next(iter(records), None)
    if row is None:
        raise DataError("expected at least one record, got none.", code="empty_data")
    return dict(row)


def _formatter_of(row: Row) -> Formatter:
    """The formatter whose columns the row has."""
    if isinstance(row.get("messages"), list) or isinstance(row.get("prompt"), list):
        return formatters.chat()
    if isinstance(row.get("prompt"), str):
        return formatters.prompt_completion()
    if isinstance(row.get("text"), str):
        return formatters.text()
    raise DataError(
        f"expected columns messages, prompt and completion, or text, found {sorted(row)}. "
        "Load the data with load_records, or pass a formatter.",
        code="unknown_format",
    )


def _cache_file(records: Dataset, fingerprint: str) -> str | None:
    """Where to cache the encoding of records that lie in memory; `None` leaves it to datasets."""
    if records.cache_files or not datasets.is_caching_enabled():
        return None
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "ftlib"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: no cache, rather than no training
        return None
    return str(folder / f"{fingerprint}.arrow") if os.access(folder, os.W_OK) else None


def _identity(value: Any) -> str:
    """A hash of a formatter or function, of its source text too where there is one."""
    code = value if inspect.isroutine(value) else type(value)
    try:
        source = inspect.getsource(code)
    except (OSError, TypeError):
        source = ""
    return f"{Hasher.hash(value)}:{hashlib.blake2b(source.encode(), digest_size=8).hexdigest()}"


def _code_fingerprint() -> str:
    """A hash of this package's source: a changed encoder never finds an old one's cache."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(resources.files("ftlib.data").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()
