"""`prepare`: check a file of training data, fix what can be fixed, and say what was found."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from ftlib.data.preparation.decisions import Decisions
from ftlib.data.preparation.prepared import Prepared
from ftlib.data.preparation.report import build_report
from ftlib.data.preparation.run import examine
from ftlib.data.preparation.settings import Settings, SplitMethod, Task
from ftlib.data.preparation.source import parts_of
from ftlib.data.preparation.tokens import TokenCounter
from ftlib.errors import ConfigError

__all__ = ["prepare", "settings_of"]


def prepare(
    source: Any,
    *,
    tokenizer: Any = None,
    fixes: Mapping[str, bool] | None = None,
    accept: Literal["default", "none"] | Callable[[str], bool] = "default",
    columns: Mapping[str, str] | None = None,
    skip_bad: bool = False,
    encoding: str | None = None,
    delimiter: str | None = None,
    header: bool = True,
    sheet: str | None = None,
    task: Task | None = None,
    max_length: int = 2048,
    ending: str | None = None,
    split_method: SplitMethod = "stratified",
    validation: float | None = None,
    group: str | None = None,
    seed: int | None = None,
    positive_class: str | None = None,
) -> Prepared:
    r"""Check training data and fix them. The source is never changed, and nothing is written by this call.

    Checks run in a fixed order, each on the rows left by the fixes accepted before it. Pairs of prompt and
    completion are brought into one shape; messages and preferences are checked, and stay as they are.

    Args:
        source: a path or several (`.csv`, `.tsv`, `.txt`, `.json`, `.jsonl`, `.xlsx`, `.parquet`, also
            `.gz` and `.zst`), a `datasets.Dataset`, a frame, or a list of dicts.
        tokenizer: of transformers, its name or its folder: lengths are then counted, not estimated.
        fixes: check -> whether to apply its fix; overrides `accept`.
        accept: ``"default"`` applies the fixes that are on by default, ``"none"`` no optional one; a
            function is asked about those that are on by default, with the question.
        columns: `prompt` or `completion` -> name in the source.
        skip_bad: leave out rows that cannot be read; otherwise they are one error.
        encoding: of text files; UTF-8 unless a byte order mark says otherwise.
        delimiter: of CSV and TSV; found by the header.
        header: whether a table's first row names its columns.
        sheet: of a workbook, or ``"all"``.
        task: ``"open-ended"``, ``"classification"`` or ``"conditional"``; guessed unless told.
        max_length: tokens, from 1.
        ending: text that all completions are to end in; ``"eos"`` for none but the end-of-sequence token;
            `None` for the first candidate that is free.
        split_method: ``"stratified"``, or ``"legacy"`` for the membership that older tools drew.
        validation: share of validation rows, between 0 and 1; `None` is 0.2, at most 1,000 rows.
        group: rows that stay on one side: of one ``"prompt"`` (`None`), of ``"near"`` duplicate prompts, or
            of one value of this column.
        seed: of the split; `None` is 0.
        positive_class: which label counts as positive, for the report. It is never guessed.

    Raises:
        DataError: the source cannot be read or used; all bad rows at once.
        ConfigError: an option that is unknown, out of range, or without effect on this source.
        MissingPackageError: an extra that the format needs is not installed.

    Example:
        >>> rows = [{"prompt": "Capital of Peru?", "completion": "Lima"},
        ...         {"prompt": "River in Vienna?", "completion": "The Danube"}]
        >>> prepared = prepare(rows)
        >>> prepared.records[0]["prompt"], prepared.records[0]["completion"]
        ('Capital of Peru? ->', ' Lima\n')
        >>> prepared.report["inference"]["stop"]
        ['\n']
    """
    settings = settings_of(
        tokenizer=tokenizer,
        fixes=fixes or {},
        columns=columns or {},
        skip_bad=skip_bad,
        encoding=encoding,
        delimiter=delimiter,
        header=header,
        sheet=sheet,
        task=task,
        max_length=max_length,
        ending=ending,
        split_method=split_method,
        validation=validation,
        group=group,
        seed=seed,
        positive_class=positive_class,
    )
    if not callable(accept) and accept not in ("default", "none"):
        raise ConfigError(f"prepare: expected accept as 'default', 'none' or a function, got {accept!r}.")
    decisions = (
        Decisions(settings.fixes, "ask", accept) if callable(accept) else Decisions(settings.fixes, accept)
    )
    parts = parts_of(source, settings)
    folder = Path(tempfile.mkdtemp(prefix="ftlib-prepare-"))
    try:
        outcome = examine(parts, settings, decisions, folder)
        report = build_report(outcome, tuple(part.sha256() for part in parts))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Prepared(outcome, report, folder)


def settings_of(*, tokenizer: Any = None, **options: Any) -> Settings:
    """The arguments of `prepare` as its settings.

    Raises:
        ConfigError: an option out of range, or options that clash.
    """
    return Settings(**options, counter=None if tokenizer is None else TokenCounter(tokenizer))
