"""``python -m ftlib prepare``: the same on the command line.

Exit codes: 0 done, nothing to do, or writing declined; 1 the data cannot be used; 2 wrong usage; 3 warnings
under ``--strict``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from ftlib.data.preparation.decisions import yes_or_no
from ftlib.data.preparation.prepare import prepare, settings_of
from ftlib.data.preparation.prepared import Prepared
from ftlib.data.preparation.settings import TASKS, Settings
from ftlib.data.preparation.writing import earlier_report
from ftlib.errors import ConfigError, DataError, FtlibError

__all__ = ["add_arguments", "run"]

_TAB = "\t"
_DONE, _BAD_DATA, _BAD_USAGE, _WARNED = 0, 1, 2, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    add = parser.add_argument
    add("file", nargs="+", type=Path, metavar="FILE", help="data to prepare; several are checked together")
    add("-q", "--quiet", action="store_true", help="accept every fix that is on by default, ask nothing")
    add("--no", action="store_true", help="decline all optional fixes, ask nothing")
    add("--fix", action="append", default=[], metavar="ID=on|off", help="decide about one fix")
    add("--dry-run", action="store_true", help="report, write nothing")
    add("--json", action="store_true", help="print only the report, as JSON")
    add("--out", type=Path, metavar="FOLDER", help="where to write; beside the file unless told")
    add("--strict", action="store_true", help="exit with 3 where there are warnings")
    add("--skip-bad", action="store_true", help="leave out rows that cannot be read")
    add("--map", action="append", default=[], metavar="completion=NAME", help="name of a column in the file")
    add("--sheet", metavar="NAME|all", help="sheet of a workbook")
    add("--no-header", action="store_true", help="the first row of a table is data")
    add("--delimiter", help="of CSV and TSV")
    add("--encoding", help="of text files, such as latin-1")
    add("--task", choices=TASKS, help="instead of guessing")
    add("--tokenizer", metavar="NAME", help="count tokens with it, instead of estimating")
    add("--max-length", type=int, default=2048, metavar="TOKENS", help="longest row (default: %(default)s)")
    add("--ending", metavar="TEXT|eos", help="what completions end in")
    add("--split-method", choices=("stratified", "legacy"), default="stratified")
    add("--validation", type=float, metavar="SHARE", help="of validation rows")
    add("--group", metavar="prompt|near|COLUMN", help="rows that stay on one side of the split")
    add("--seed", type=int, help="of the split")
    add("--positive-class", metavar="LABEL", help="the label that counts as positive")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    try:
        return _run(args)
    except DataError as error:
        return _complain(args, error, error.code, _BAD_DATA)
    except ConfigError as error:
        return _complain(args, error, "usage", _BAD_USAGE)
    except FtlibError as error:
        return _complain(args, error, "missing_package", _BAD_DATA)


def _run(args: argparse.Namespace) -> int:
    if args.quiet and args.no:
        raise ConfigError("prepare: -q accepts the fixes that --no declines. Take one of them.")
    options = _options(args)
    settings = settings_of(**options)
    if settings.counter is not None:
        options["tokenizer"] = settings.counter.tokenizer  # loaded once
    if not args.dry_run:
        earlier = _already_done(args, settings)
        if earlier is not None:
            made = earlier.pop("_made")
            _show(args, earlier, f"Already prepared: see {earlier.pop('_path')}. Nothing to do.")
            return _DONE if made else _status(args, earlier)
    asks = not (args.quiet or args.no or args.dry_run)
    ask = yes_or_no(sys.stdin.readline, lambda question: _say(args, question))
    prepared = prepare(
        args.file if len(args.file) > 1 else args.file[0],
        accept=ask if asks else "none" if args.no else "default",
        **options,
    )
    if not args.json:
        _put(sys.stdout, f"{prepared}\n")
    written: list[Path] = []
    if prepared.changed and not args.dry_run and (not asks or ask("Write the result")):
        written = prepared.write(args.out)
    _show(args, prepared.report, _closing(prepared, written, dry=args.dry_run))
    return _status(args, prepared.report)


def _status(args: argparse.Namespace, report: dict[str, Any]) -> int:
    """The exit code of a run with this report."""
    warned = any(finding["level"] == "warn" for finding in report["findings"])
    return _WARNED if args.strict and warned else _DONE


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `prepare`."""
    fixes = dict(_pair(given, "--fix duplicate=on") for given in args.fix)
    wrong = [f"{check}={value}" for check, value in fixes.items() if value not in ("on", "off")]
    if wrong:
        raise ConfigError(f"prepare: expected --fix ID=on or ID=off, got {wrong[0]!r}.")
    return {
        "tokenizer": args.tokenizer,
        "fixes": {check: value == "on" for check, value in fixes.items()},
        "columns": dict(_pair(given, "--map completion=answer") for given in args.map),
        "skip_bad": args.skip_bad,
        "encoding": args.encoding,
        "delimiter": _TAB if args.delimiter in ("\\t", "tab") else args.delimiter,
        "header": not args.no_header,
        "sheet": args.sheet,
        "task": args.task,
        "max_length": args.max_length,
        "ending": args.ending,
        "split_method": args.split_method,
        "validation": args.validation,
        "group": args.group,
        "seed": args.seed,
        "positive_class": args.positive_class,
    }


def _pair(given: str, example: str) -> tuple[str, str]:
    name, found, value = given.partition("=")
    if not found or not name:
        raise ConfigError(f"prepare: expected a pair such as {example}, got {given!r}.")
    return name, value


def _already_done(args: argparse.Namespace, settings: Settings) -> dict[str, Any] | None:
    """The report of an earlier run on these files, if it leaves nothing to do."""
    if not all(path.is_file() for path in args.file):
        return None  # said when it is read
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in args.file]
        shas = tuple(hashlib.file_digest(file, "sha256").hexdigest() for file in files)
    folders = {args.out or args.file[0].parent, args.file[0].parent}
    reports = (
        earlier_report(folder, shas, settings.to_dict()) for folder in sorted(folders) if folder.is_dir()
    )
    return next((report for report in reports if report is not None), None)


def _closing(prepared: Prepared, written: list[Path], *, dry: bool) -> str:
    if written:
        return "\n".join(f"Wrote {path}" for path in written)
    if not prepared.changed:
        return "Nothing to do: nothing was written."
    return "Dry run: nothing was written." if dry else "Nothing was written."


def _show(args: argparse.Namespace, report: dict[str, Any], closing: str) -> None:
    """The report on standard output, or what there is to say beside the summary."""
    if args.json:
        sys.stdout.write(json.dumps(report, indent=1) + "\n")
    else:
        _put(sys.stdout, f"{closing}\n")


def _say(args: argparse.Namespace, question: str) -> None:
    stream = sys.stderr if args.json else sys.stdout
    _put(stream, question)
    stream.flush()


def _put(stream: TextIO, text: str) -> None:
    """Write `text`, whatever the stream can encode: texts of a file may hold any character."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


def _complain(args: argparse.Namespace, error: FtlibError, code: str, status: int) -> int:
    _put(sys.stderr, f"{code}: {error}\n")
    if args.json:
        fields = error.fields if isinstance(error, DataError) else {"code": code}
        fields = {**fields, "message": str(error)}
        sys.stdout.write(json.dumps({"error": fields}, indent=1, default=str) + "\n")
    return status
