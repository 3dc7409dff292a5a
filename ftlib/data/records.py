"""Any source to canonical records, each row knowing where it came from.

Which formats there are is told in `ftlib.data.formats`, how files are read in `ftlib.data.reading`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, final

from datasets import Dataset, IterableDataset

from ftlib.checks import NAMES, PATH, SWITCH, TEXT, check, number, one_of
from ftlib.data.formats import FormatOptions, Outputs
from ftlib.data.loading.choose import Choice, choose, header_hint, looked_at
from ftlib.data.loading.convert import Converter, Pairs, renamed
from ftlib.data.loading.outcome import Outcome
from ftlib.data.loading.rejects import OnError, beside, check_rejected_file, check_share, write_rejected
from ftlib.data.loading.report import LoadReport, load_report
from ftlib.data.loading.sources import Source, paths_of
from ftlib.data.loading.streams import streamed
from ftlib.data.messages import ROLES
from ftlib.data.preferences import ranks_of
from ftlib.data.problems import gathered
from ftlib.data.reading import Located
from ftlib.data.tables import to_dataset
from ftlib.errors import ConfigError, DataError

__all__ = ["LoadReport", "load_records", "load_report"]

_log = logging.getLogger(__name__)


def load_records(
    source: Any,
    *,
    format: str = "auto",  # noqa: A002  the name users know
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    mixed: bool = False,
    strict: bool = False,
    on_error: OnError = "raise",
    max_bad: float | None = 0.01,
    rejected_file: str | PathLike[str] | None = None,
    outputs: Outputs = "first",
    pairs: Pairs | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
    header: bool = True,
    sheet: str | None = None,
) -> Any:
    r"""Records in canonical columns: `text`; `prompt` and `completion`; `messages`; `prompt` alone;
    `[prompt,] chosen, rejected[, margin]`; `prompt, answers[, ranks | scores]`; `prompt, completion, label`;
    `prompt, completions, labels`; `text, label`; `text_a, text_b, label`; `question, choices, answer`;
    `segments`; or token ids.

    `tools` stay beside messages. Other columns are kept; one that bears a canonical name of another
    format becomes ``extra_<name>``. `_source` holds ``file:row``. What became of the rows is logged, and
    told by `load_report`.

    Preferences come in many spellings (`accepted`, `response_chosen`, `question`, ...; see
    `ftlib.data.spellings`). A prompt inside both sides is taken out: of message lists the messages that
    both begin with, of dialogues written as ``\n\nHuman:`` and ``\n\nAssistant:`` all before the last
    answer. `answers` are ranked by `ranks` (1 = best, equal ranks tie), by `scores` (higher is better), or
    else by their order, which is logged. No margin is made of scores.

    Args:
        source: a path or several (`.jsonl`, `.json`, `.csv`, `.tsv`, `.xlsx`, `.parquet`, `.txt`, perhaps
            with `.gz` or `.zst`), a `datasets.Dataset`, an `IterableDataset`, a pandas or polars frame, or
            a list of dicts. It is never changed.
        format: ``"auto"`` looks at the first 256 rows and 256 more; or the name of a rule in
            `ftlib.data.formats`; or ``"rows"``, which takes rows as they are, for a formatter of your own.
        columns: canonical name -> name in the source.
        roles: further spelling of a role -> system, user, assistant or tool.
        mixed: decide the format of every row by itself.
        strict: refuse rows whose text could be read in two formats.
        on_error: ``"raise"`` raises all bad rows at once; ``"skip"`` leaves them out and writes them down,
            each with its place and reason.
        max_bad: share of bad rows from which ``"skip"`` raises too; `None` sets no limit.
        rejected_file: where ``"skip"`` writes bad rows. `None`: those of a file to ``<stem>_rejected.jsonl``
            beside it; those of a stream, which has no name, are logged one by one, those of rows in memory
            counted. A stream begins the file anew each time it is read, and worker k of a `DataLoader`
            writes ``<stem>_worker<k>.jsonl``.
        outputs: of formats with several outputs to one input, the ``"first"`` or ``"all"``.
        pairs: makes pairs of ranked answers: ``"best_worst"``, or ``"all"`` of different rank.
        encoding: of text files without a byte order mark, UTF-8 unless told.
        delimiter: of CSV and TSV, found by the header unless told.
        header: whether the first row of a table names its columns.
        sheet: of a workbook with several, its name or ``"all"``.

    Returns:
        A `Dataset` in memory; of an `IterableDataset` another one, converted as it is read.

    Raises:
        DataError: every bad row at once, the first 20 in full; or what is wrong with a whole source.
        ConfigError: an unknown format, a source of no known kind, or options that clash.
    """
    check(
        "load_records",
        {
            "format": (format, TEXT),
            "columns": (columns, NAMES.or_none),
            "roles": (roles, NAMES.or_none),
            "mixed": (mixed, SWITCH),
            "strict": (strict, SWITCH),
            "on_error": (on_error, one_of(OnError)),
            "max_bad": (max_bad, number(0, most=1).or_none),
            "rejected_file": (rejected_file, PATH.or_none),
            "outputs": (outputs, one_of(Outputs)),
            "pairs": (pairs, one_of(Pairs).or_none),
        },
    )
    reading = {"encoding": encoding, "delimiter": delimiter, "header": header, "sheet": sheet}
    request = _Request(
        format,
        dict(columns or {}),
        FormatOptions({**ROLES, **_checked_roles(roles or {})}, outputs),
        mixed,
        strict,
        on_error,
        max_bad,
        None if rejected_file is None else Path(rejected_file),
        pairs,
    )
    check_rejected_file(request.rejected_file, on_error)
    if isinstance(source, IterableDataset):
        return streamed(source, request.converter, on_error, max_bad, request.rejected_file)
    return _loaded(Source(source, reading), request)


@final
@dataclass(frozen=True)
class _Request:
    """What the user asked for; see `load_records`."""

    format: str
    columns: dict[str, str]
    options: FormatOptions
    mixed: bool
    strict: bool
    on_error: OnError
    max_bad: float | None
    rejected_file: Path | None
    pairs: Pairs | None

    def converter(self, rows: Sequence[Located], source: Source) -> Converter:
        """The converter for data of which these rows were looked at."""
        readable = [(row.value, row.place) for row in rows if isinstance(row.value, dict)]
        given = [row for row, _ in readable]
        file = str(rows[0].place.file) if rows else source.name
        self._check_columns(given, file, header_hint(source.is_table))
        choice = choose(
            [renamed(row, self.columns) for row in given],
            format=self.format,
            columns=self.columns,
            strict=self.strict,
            mixed=self.mixed,
            file=file,
            places=[place for _, place in readable],
            is_table=source.is_table,
        )
        self._check_use(choice)
        return Converter(choice, self.options, self.columns, self.pairs)

    def _check_use(self, choice: Choice) -> None:
        given = {"pairs": self.pairs is not None, "outputs": self.options.outputs != "first"}
        obeyed = ("pairs", "outputs") if choice.mixed else choice.rule.obeys if choice.rule else ()
        useless = [name for name, there in given.items() if there and name not in obeyed]
        if useless:
            raise ConfigError(
                f"load_records: {useless[0]} has no effect on rows read as {choice.name!r}. Leave it out, or "
                "name the format you mean."
            )

    def _check_columns(self, rows: list[dict[str, Any]], file: str, hint: str) -> None:
        found = {name for row in rows for name in row}
        missing = sorted(set(self.columns.values()) - found)
        if missing:
            raise DataError(
                f"expected the columns {missing}, found {sorted(found)}. "
                f"columns maps a canonical name to a name in the data.{hint}",
                code="missing_column",
                file=file,
                column=missing[0],
            )


def _loaded(source: Source, request: _Request) -> Dataset:
    located = list(source)
    outcome = Outcome(rows=len(located))
    if not located:
        raise DataError("expected rows, got none.", code="empty_data", file=source.name)
    good = [row for row in located if isinstance(row.value, dict)]
    if not good:
        raise _unreadable(located, request, source)
    try:
        convert = request.converter(looked_at(good), source)
    except DataError as error:  # rows that cannot be read may be what is wrong
        raise gathered(
            [*(row.value for row in located if isinstance(row.value, DataError)), error]
        ) from error
    rule = convert.choice.rule
    if rule is not None and rule.gather is not None:
        made = rule.gather([_renamed(row, request.columns) for row in located], request.options)
        located = made.rows
        outcome.dropped.update(made.dropped)
    for row in located:
        outcome.add(row, convert)
    if rule is not None and rule.gather is not None:
        outcome.used = outcome.rows - outcome.dropped.total() - len(outcome.rejects)
    problems = [error for _, error in outcome.rejects]
    if problems and request.on_error == "raise":
        raise gathered(problems)
    check_share(problems, outcome.rows, request.max_bad)
    if not outcome.records:
        told = outcome.report(convert, source.notes)
        raise DataError(f"expected records, got none: {told}.", code="empty_data", file=source.name)
    report = outcome.report(
        convert, source.notes + convert.notes, _written(outcome, source, request.rejected_file)
    )
    _tell(report, outcome.records)
    return report.attached(to_dataset(outcome.records))


def _unreadable(located: Sequence[Located], request: _Request, source: Source) -> DataError:
    """The error of a source of which no row can be read."""
    problems = [row.value for row in located if isinstance(row.value, DataError)]
    if request.on_error == "raise":
        return gathered(problems)
    check_share(problems, len(located), request.max_bad)
    told = f"expected records, got none: rejected {len(problems)} of {len(located)} rows."
    return DataError(told, code="empty_data", file=source.name)


def _written(outcome: Outcome, source: Source, rejected_file: Path | None) -> Path | None:
    """Where the bad rows were written down; the last place, of several."""
    if rejected_file is not None:
        rejected_file.unlink(missing_ok=True)
    files = {str(path): beside(path) for path in paths_of(source.given)}
    places: dict[Path, list[tuple[Located, DataError]]] = {}
    for row, error in outcome.rejects:
        place = rejected_file or files.get(str(row.place.file))
        if place is not None:
            places.setdefault(place, []).append((row, error))
    for place, rejects in places.items():
        write_rejected(rejects, place)
    return next(reversed(places), None)


def _tell(report: LoadReport, records: list[dict[str, Any]]) -> None:
    _log.log(logging.WARNING if report.is_notable else logging.INFO, "load_records: %s.", report)
    if report.format == "ranked" and "answers" in records[0] and not any(map(ranks_of, records)):
        _log.warning("load_records: answers without ranks or scores are read as best first.")


def _renamed(row: Located, columns: Mapping[str, str]) -> Located:
    return row if isinstance(row.value, DataError) else Located(row.place, renamed(row.value, columns))


def _checked_roles(roles: Mapping[str, str]) -> Mapping[str, str]:
    wrong = sorted({role for role in roles.values() if role not in ROLES.values()})
    if wrong:
        raise ConfigError(
            f"load_records: expected roles to map to {sorted(set(ROLES.values()))}, got {wrong}."
        )
    return roles
