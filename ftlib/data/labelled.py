"""Labelled texts to token ids: rows with `text`, or `text_a` and `text_b`, and perhaps a `label`.

A row becomes what the tokenizer itself makes of it, special tokens and template for pairs included: what
plain transformers would give the model. Where the tokenizer tells two segments apart (BERT's token types),
the first is the example's prefix and the second its continuation.

Left out: one row per sentence of a longer text, and texts cut into overlapping windows.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, final, get_args

from datasets import ClassLabel, Dataset, Features
from transformers import PreTrainedTokenizerBase

from ftlib.data.audit import repeated
from ftlib.data.cells import text
from ftlib.data.examples import Example, refused
from ftlib.data.fingerprint import code_fingerprint
from ftlib.data.labels import Labels, find_labels
from ftlib.data.problems import gathered
from ftlib.data.records import load_records
from ftlib.data.report import Report
from ftlib.data.status import STATUS, as_columns, count, features
from ftlib.data.tokens import TokenBackend
from ftlib.errors import ConfigError, DataError

__all__ = ["LabelledEncoder", "labelled_records", "labels_in"]

_log = logging.getLogger(__name__)
_JOINED = "\n"  # between two texts, for a tokenizer without a template for pairs
_BATCH = 1000  # rows tokenised together
TooLong = Literal["error", "drop", "truncate"]


def labelled_records(source: Any) -> Dataset:
    """Rows with `text`, or `text_a` and `text_b`, from anything `load_records` takes, or from plain texts.

    The class names of a `datasets.ClassLabel` take the place of its numbers.

    Raises:
        DataError: no such columns, or an empty text; all bad rows at once.
    """
    if isinstance(source, Sequence) and source and all(isinstance(row, str) for row in source):
        source = [{"text": row} for row in source]
    if isinstance(source, Dataset):
        source = _with_names(source)
    is_loaded = isinstance(source, Dataset) and "_source" in source.column_names
    records = source if is_loaded else load_records(source, format="rows")
    if not _has_texts(records.column_names):
        with suppress(DataError):
            records = load_records(records)  # other spellings
    if not _has_texts(records.column_names):
        raise DataError(
            f"expected columns text, or text_a and text_b, found {sorted(records.column_names)}. Map them: "
            'load_records(source, columns={"text": ...}).',
            code="missing_column",
            file=str(records[0].get("_source", "")).rpartition(":")[0] or None,
            column="text",
        )
    return records


def labels_in(records: Dataset) -> Labels:
    """The classes that the rows name, sorted.

    Raises:
        DataError: rows without a label, or with labels of several kinds.
        ConfigError: fewer than two classes.
    """
    if "label" not in records.column_names:
        raise DataError(
            f"expected a column label, found {sorted(records.column_names)}. Map it: "
            'load_records(source, columns={"label": ...}).',
            code="missing_column",
            column="label",
        )
    labels, problems = find_labels(records["label"][:])
    if labels is None:
        raise gathered(
            [refused(_source(records[row], row), error).problem or error for row, error in problems]
        )
    return labels


@final
class LabelledEncoder:
    """Encodes labelled texts for one tokenizer; a private copy of it, which is never changed.

    Args:
        tokenizer: any transformers tokenizer with a fast backend.
        labels: the classes, in the order of the model's outputs; None takes those of the first rows that
            are encoded.
        max_length: tokens per row; None leaves length alone.
        overflow: for longer rows: ``"error"``, ``"drop"`` or ``"truncate"`` (the longer text of a pair
            first, from the right; special tokens stay).

    Raises:
        ConfigError: unknown options, or options without effect.
        CapabilityError: a tokenizer without a fast backend.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: Labels | None = None,
        max_length: int | None = None,
        overflow: TooLong = "error",
    ) -> None:
        if overflow not in get_args(TooLong):
            raise ConfigError(
                f"LabelledEncoder: expected overflow as one of {list(get_args(TooLong))}, got {overflow!r}."
            )
        if max_length is None and overflow != "error":
            raise ConfigError(
                f"LabelledEncoder: overflow={overflow!r} has no effect without max_length. Give both."
            )
        if max_length is not None and max_length < 1:
            raise ConfigError(f"LabelledEncoder: expected max_length >= 1, got {max_length}.")
        self.labels = labels
        self.max_length = max_length
        self.overflow = overflow
        self.report = Report()
        self._backend = TokenBackend(tokenizer)
        self._tokenizer = self._backend.tokenizer
        self._tokenizer.truncation_side = "right"
        special = self._tokenizer.num_special_tokens_to_add
        self._pairs = special(pair=True) > special(pair=False)

    def __call__(self, source: Any) -> Dataset:
        """Encode rows. `report` then tells about this call.

        Args:
            source: anything `load_records` takes, or plain texts. Rows without a column `label` can be
                predicted, not learned.

        Returns:
            A `Dataset` with the columns of encoded data, the label's numbers and ``weight``.

        Raises:
            DataError: every bad row at once: an empty text, an unknown label, one too long.
        """
        records = labelled_records(source)
        labelled = "label" in records.column_names
        if labelled and self.labels is None:
            self.labels = labels_in(records)
        extras = (*(self.labels.columns if labelled and self.labels else ()), "weight")
        encoded = records.with_format(None).map(
            lambda rows, indices: self._columns(_rows(rows), indices, extras),
            batched=True,
            batch_size=_BATCH,
            with_indices=True,
            remove_columns=records.column_names,
            features=Features({**features(extras), **STATUS}),
            new_fingerprint=self._fingerprint(records),
            keep_in_memory=True,
            desc="Encoding",
        )
        self.report = Report()
        status = encoded.select_columns(["length", "source", *STATUS])
        count(self.report, status)
        if self.report.dropped:
            encoded = encoded.select([i for i, reason in enumerate(status["dropped"]) if reason is None])
        self.report.duplicates = repeated(encoded["digest"], set())
        if flags := [flag for flag in self.report.flags() if "terminator" not in flag]:
            _log.warning("LabelledEncoder: %s.", "; ".join(flags))
        return encoded.remove_columns(list(STATUS))

    def _columns(
        self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int], extras: Sequence[str]
    ) -> dict[str, list[Any]]:
        columns = [as_columns(example, extras) for example in self._encode(rows, indices, "label" in rows[0])]
        return {name: [column[name] for column in columns] for name in columns[0]}

    def _encode(
        self, rows: Sequence[Mapping[str, Any]], indices: Sequence[int], labelled: bool
    ) -> list[Example]:
        made: list[Example | tuple[str, str | None, dict[str, float]]] = []
        for row, index in zip(rows, indices, strict=True):
            try:
                first, second = self._texts(row)
                given = self.labels.numbers(row["label"]) if labelled and self.labels is not None else {}
                made.append((first, second, given))
            except DataError as error:
                made.append(refused(_source(row, index), error))
        pairs = [(each[0], each[1]) for each in made if not isinstance(each, Example)]
        tokens = iter(self._tokens(pairs))
        return [
            each if isinstance(each, Example) else self._example(row, index, each, next(tokens))
            for row, index, each in zip(rows, indices, made, strict=True)
        ]

    def _texts(self, row: Mapping[str, Any]) -> tuple[str, str | None]:
        """The one text of a row or its two; one where no template would tell the two apart."""
        if row.get("text") is not None or row.get("text_a") is None:
            return text(row.get("text"), "text"), None
        first, second = (text(row.get(name), name) for name in ("text_a", "text_b"))
        return (first, second) if self._pairs else (f"{first}{_JOINED}{second}", None)

    def _tokens(self, texts: Sequence[tuple[str, str | None]]) -> list[tuple[list[int], int, bool]]:
        """Ids, where the second segment begins (0 where nothing tells), and whether they were cut."""
        found: dict[int, tuple[list[int], int, bool]] = {}
        for paired in (False, True):
            mine = [i for i, (_, second) in enumerate(texts) if (second is not None) is paired]
            if not mine:
                continue
            given: tuple[list[Any], ...] = ([texts[i][0] for i in mine],)
            given += ([texts[i][1] for i in mine],) if paired else ()
            whole = self._tokenizer(*given, **_AS_IT_IS)
            cut = whole
            if self.overflow == "truncate" and self.max_length is not None:
                cut = self._tokenizer(*given, **_AS_IT_IS | {"truncation": True}, max_length=self.max_length)
            for place, i in enumerate(mine):
                ids = cut["input_ids"][place]
                types = cut["token_type_ids"][place] if "token_type_ids" in cut else ()
                begins = types.index(1) if sorted(types) == list(types) and set(types) == {0, 1} else 0
                found[i] = ids, begins, len(ids) < len(whole["input_ids"][place])
        return [found[i] for i in range(len(texts))]

    def _example(
        self,
        row: Mapping[str, Any],
        index: int,
        made: tuple[str, str | None, dict[str, float]],
        tokens: tuple[list[int], int, bool],
    ) -> Example:
        (ids, begins, cut), source = tokens, _source(row, index)
        if not ids:
            return refused(source, DataError("expected a text with tokens, got none.", column="text"))
        too_long = self.max_length is not None and len(ids) > self.max_length
        if too_long and self.overflow == "error":
            return refused(
                source,
                DataError(
                    f"expected at most {self.max_length} tokens, got {len(ids)}. Choose overflow='drop' or "
                    "'truncate', raise max_length, or shorten the row.",
                    code="too_long",
                ),
            )
        notes = ["truncated"] if cut else []
        notes += ["control_text"] if any(map(self._backend.control.search, filter(None, made[:2]))) else []
        own = ids[begins:]
        return Example(
            (ids[:begins], [0.0] * begins),
            ((own, [0.0] * (len(own) - 1) + [1.0]),),
            source,
            extras={**{name: (value,) for name, value in made[2].items()}, "weight": (1.0,)},
            trained=1,
            notes=tuple(notes),
            dropped="too_long" if too_long else None,
        )

    def _fingerprint(self, records: Dataset) -> str:
        labels = None if self.labels is None else [list(self.labels.names), self.labels.several]
        inputs = [
            code_fingerprint(),
            self._backend.fingerprint,
            labels,
            self.max_length,
            self.overflow,
            records._fingerprint,
        ]
        return hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()


# Control tokens written in a text stay ordinary characters; the template's own are added round it.
_AS_IT_IS: dict[str, Any] = {
    "add_special_tokens": True,
    "split_special_tokens": True,
    "padding": False,
    "truncation": False,
    "return_attention_mask": False,
    "return_token_type_ids": True,
    "verbose": False,
}


def _has_texts(columns: Sequence[str]) -> bool:
    return "text" in columns or {"text_a", "text_b"} <= set(columns)


def _with_names(data: Dataset) -> Dataset:
    kind = data.features.get("label")
    if not isinstance(kind, ClassLabel):
        return data
    names = [None if number is None or number < 0 else kind.int2str(number) for number in data["label"]]
    return data.remove_columns("label").add_column("label", names)


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _source(row: Mapping[str, Any], index: int) -> str:
    return str(row.get("_source") or f"<records>:{index + 1}")
