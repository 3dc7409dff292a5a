"""Records to token ids with one loss weight per token. Data sets and caching; the rows themselves are
encoded in `ftlib.data.rows`, and counted in `ftlib.data.status`.

Each example is a prefix and its continuations (see `ftlib.batches.Group`), ids unshifted, weights
aligned with ids.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, final

from datasets import Dataset, Features, IterableDataset
from transformers import PreTrainedTokenizerBase

from ftlib.checks import COUNT, NATURAL, Wanted, one_of
from ftlib.checks import check as check_options
from ftlib.data import audit, formatters
from ftlib.data.cloze import Cloze
from ftlib.data.environment import environment_kept, no_garbage_collection
from ftlib.data.fingerprint import cache_file, code_fingerprint, identity
from ftlib.data.overflow import Overflow
from ftlib.data.preview import Preview, preview_row
from ftlib.data.records import load_records
from ftlib.data.report import Report
from ftlib.data.rows import RowEncoder
from ftlib.data.segments import Answers, Formatter, Made, Row, TrainOn
from ftlib.data.status import COLUMNS, STATUS, as_columns, count, features, raise_problems
from ftlib.data.templates import ChatTemplate
from ftlib.data.tokens import TokenBackend
from ftlib.data.weights import check
from ftlib.errors import ConfigError, DataError

__all__ = ["COLUMNS", "Encoder"]

_log = logging.getLogger(__name__)

_STREAM_BATCH = 64  # rows encoded ahead of the reader of a stream
_STATUS_BATCH = 1000  # rows of the report read at a time
_LOOKED_AT = 256  # rows tried, until one tells which numbers its answers bring

AnyFormatter = Formatter | Callable[[Row], Made]
EncodedTask = Literal["causal_lm", "seq2seq_lm"]
FORMATTER = Wanted("a function of a row, or None", lambda value: value is None or callable(value))


@final
class Encoder:
    """Encodes records for one tokenizer. It works on a private copy; the tokenizer is never changed.

    Args:
        tokenizer: any transformers tokenizer with a fast backend.
        formatter: row -> `Segments`, `Conversation` or `Answers`; `None` picks one by the columns:
            `messages`, `prompt` and `completion` (strings or message lists), `chosen` and `rejected`,
            `prompt` and `answers`, or `text`.
        train_on: what is learned. ``"completion"``: the completion with its terminator, all of a text,
            every assistant turn of `messages`. ``"assistant"``: every assistant turn, those of the prompt
            included. ``"last"``: only a final assistant turn. ``"all"``: every token. ``"weighted"``:
            messages by their `weight`, otherwise assistant turns. A function: `Segments` -> one weight
            per part. Message weights multiply every preset. Of several answers to one prompt, only the
            answers are learned: ``"completion"`` or ``"last"``.
        prompt_loss_weight: loss weight of prompt tokens, >= 0.
        max_length: tokens per example, of several answers the prompt with the longest one; `None` leaves
            length alone.
        overflow: for longer examples: ``"error"``, ``"drop"``, ``"truncate_prompt"`` (from the left, a BOS
            stays) or ``"truncate"`` (from the right; a terminator that is cut is not put back). Several
            answers keep one prompt.
        task: of `ftlib.load`. ``"seq2seq_lm"``, for an encoder-decoder: the prompt ends as the tokenizer ends
            text (T5: in EOS), and the completion begins a text of its own. Of a conversation, every
            assistant turn is an example whose prompt is all that stands before it.

    Raises:
        ConfigError: unknown options, options without effect, or prompts to be learned of an encoder-decoder.
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
        task: EncodedTask = "causal_lm",
    ) -> None:
        check(train_on, prompt_loss_weight)
        must = {
            "formatter": (formatter, FORMATTER),
            "max_length": (max_length, COUNT.or_none),
            "overflow": (overflow, one_of(Overflow)),
            "task": (task, one_of(EncodedTask)),
        }
        check_options("Encoder", must)
        if task == "seq2seq_lm" and (train_on not in ("completion", "last") or prompt_loss_weight):
            raise ConfigError(
                f"Encoder: train_on={train_on!r:.40} with prompt_loss_weight={prompt_loss_weight} would "
                "train the prompt, which an encoder-decoder never predicts. Use train_on="
                '"completion" or "last" and no prompt_loss_weight.'
            )
        if max_length is None and overflow != "error":
            raise ConfigError(f"Encoder: overflow={overflow!r} has no effect without max_length. Give both.")
        self._backend = TokenBackend(tokenizer)
        if isinstance(formatter, Cloze):
            formatter = formatter.bound(self._backend)
        self.formatter = formatter
        self.train_on = train_on
        self.prompt_loss_weight = prompt_loss_weight
        self.max_length = max_length
        self.overflow = overflow
        self.task = task
        self.report = Report()
        self._warned: set[str] = set()
        self._template = ChatTemplate(self._backend.tokenizer, self._backend.control)
        self._resolved = formatter

    def using(self, formatter: AnyFormatter) -> Encoder:
        """The same encoder with another formatter, without the cost of a new one for this tokenizer."""
        other = copy(self)
        other.formatter = formatter.bound(self._backend) if isinstance(formatter, Cloze) else formatter
        other._resolved, other.report, other._warned = other.formatter, Report(), set()
        return other

    def __call__(self, records: Any, *, num_proc: int | None = None, against: Dataset | None = None) -> Any:
        """Encode records. `report` then tells about this call; each kind of red flag in it is logged once.

        Args:
            records: records, anything `load_records` takes, or an `IterableDataset`.
            num_proc: worker processes; the result does not depend on it.
            against: data that this encoder encoded before, such as the training data of a validation set:
                `report.overlap` counts the prompts of `records` that stand in it.

        Returns:
            A `Dataset` with `COLUMNS`, cached under a fingerprint of every input; of an
            `IterableDataset`, another one, whose report grows as it is read. Comparisons have one
            continuation per answer, the better one of a pair first, and with it `margin` or `rank`, one
            number per continuation, where the records have them.

        Raises:
            DataError: every bad row at once: nothing to train (``empty_target``), too long
                (``too_long``), a template that fails (``template``), answers that are equal
                (``identical_answers``) or share no prompt (``prompts_differ``).
            ConfigError: options that would train the prompt of several answers; `against` for a stream.
        """
        check_options("Encoder", {"num_proc": (num_proc, COUNT.or_none)})
        records = self._records(records)
        worker = _Worker(self._rows(records))
        if isinstance(records, IterableDataset):
            if against is not None:
                raise ConfigError(
                    "Encoder: against has no effect on a stream, whose report grows as it is read."
                )
            return self._stream(records, worker)
        fingerprint = self._fingerprint(records, worker.rows.formatter)
        with environment_kept():
            encoded = records.with_format(None).map(
                worker,
                batched=True,
                with_indices=True,
                num_proc=num_proc,
                remove_columns=records.column_names,
                features=Features({**features(worker.rows.extras), **STATUS}),
                new_fingerprint=fingerprint,
                cache_file_name=cache_file(records, fingerprint),
                desc="Encoding",
            )
        self.report = Report()
        status = encoded.select_columns(["length", "source", *STATUS])
        # A row at a time costs as much as its ids did.
        batches = status.with_format("arrow").iter(_STATUS_BATCH)
        count(self.report, (row for batch in batches for row in batch.to_pylist()))
        if self.report.rows != len(records):
            raise AssertionError(
                f"encoder: {len(records)} rows came in, {self.report.rows} are accounted for."
            )
        if self.report.dropped:
            encoded = encoded.select([i for i, reason in enumerate(status["dropped"][:]) if reason is None])
        self.report.duplicates = audit.repeated(encoded["digest"][:], set())
        if against is not None:
            self.report.overlap = audit.overlap(encoded, against, before=len(self._backend.bos_ids))
        self._warn()
        return encoded.remove_columns(list(STATUS))

    def _warn(self) -> None:
        """Log red flags of kinds that were not logged yet: scoring and stepping would repeat them."""
        flags = {what: n for what, n in self.report.red_flags().items() if what not in self._warned}
        self._warned.update(flags)
        if flags:
            found = "; ".join(f"{n:,} of {self.report.examples:,} {what}" for what, n in flags.items())
            _log.warning("Encoder: %s. encoder.preview(records) shows it.", found)

    def preview(self, records: Any, n: int = 3) -> Preview:
        """The first `n` rows as the model gets them, trained tokens marked."""
        check_options("Encoder.preview", {"n": (n, NATURAL)})
        records = self._records(records)
        rows = list(islice(iter(records), n))
        examples = self._rows(records).encode(rows, range(len(rows)))
        raise_problems(example.problem for example in examples)
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
        elif isinstance(row, Sequence):
            row = {"prompt": list(row)}
        elif not isinstance(row, Mapping):
            raise DataError(
                f"expected a prompt as text, messages or a row, got {row!r:.80}.", code="bad_prompt"
            )
        return self._row_encoder(self.formatter or formatters.by_columns(row)).prompt_ids(row)

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

    def _rows(self, records: Iterable[Row]) -> RowEncoder:
        first = _first(records)
        formatter = self.formatter or formatters.by_columns(first)
        made = _made(records, formatter)
        self._resolved = formatter
        if isinstance(formatter, formatters.Preference) and made is not None:
            self._resolved = formatter.based(made)
        return self._row_encoder(formatter, tuple(made.extras) if isinstance(made, Answers) else ())

    def _row_encoder(self, formatter: AnyFormatter, extras: tuple[str, ...] = ()) -> RowEncoder:
        return RowEncoder(
            self._backend,
            self._template,
            formatter,
            self.train_on,
            self.prompt_loss_weight,
            self.max_length,
            self.overflow,
            frozenset(self._stop_ids(self._resolved or formatter)),
            extras,
            apart=self.task == "seq2seq_lm",
        )

    def _stop_ids(self, formatter: AnyFormatter | None) -> set[int]:
        eos = set() if self._backend.eos_id is None else {self._backend.eos_id}
        if isinstance(formatter, formatters.Preference):
            formatter = formatter.base
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
        wanted = features(worker.rows.extras)
        seen: set[int] = set()

        def encode(batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
            if indices[0] == 0:
                seen.clear()
            encoded = worker(batch, indices)
            rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
            count(report, rows)
            kept = [row for row in rows if row["dropped"] is None]
            report.duplicates += audit.repeated([row["digest"] for row in kept], seen)
            return {name: [row[name] for row in kept] for name in wanted}

        return records.map(
            encode,
            batched=True,
            batch_size=_STREAM_BATCH,
            with_indices=True,
            remove_columns=columns,
            features=wanted,
        )

    def _fingerprint(self, records: Dataset, formatter: AnyFormatter) -> str:
        """Changes with everything that changes the result: code, tokenizer, template, options, source."""
        inputs = [
            code_fingerprint(),
            self._backend.fingerprint,
            identity(formatter),
            identity(formatter.base) if isinstance(formatter, formatters.Preference) else "",
            identity(self.train_on),
            repr(self.prompt_loss_weight),
            repr(self.max_length),
            self.overflow,
            self.task,
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
        extras = self.rows.extras
        with no_garbage_collection():
            examples = [as_columns(example, extras) for example in self.rows.encode(rows, indices)]
        return {name: [example[name] for example in examples] for name in (*features(extras), *STATUS)}


def _first(records: Iterable[Row]) -> Row:
    row = next(iter(records), None)
    if row is None:
        raise DataError("expected at least one record, got none.", code="empty_data")
    return dict(row)


def _made(records: Iterable[Row], formatter: AnyFormatter) -> Made | None:
    """What the formatter makes of the first row that it can use."""
    for row in islice(iter(records), _LOOKED_AT):
        try:
            return formatter(dict(row))
        except DataError:  # reported with all other bad rows
            continue
    return None
