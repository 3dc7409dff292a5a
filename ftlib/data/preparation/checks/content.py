"""Checks of what rows say: give-aways, personal data, secrets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ftlib.data.preparation.check import Check, Context, Finding, Fix
from ftlib.data.preparation.scan import Sensitive
from ftlib.data.preparation.sensitive import PII_KINDS, SECRET_KINDS
from ftlib.data.preparation.words import counted

__all__ = ["ANSWER_IN_PROMPT", "PII", "SECRET", "SEPARATOR_IN_COMPLETION", "TRAILING_BLANK"]


def _separator_in_completion(context: Context) -> Iterator[Finding]:
    rows = context.scan.separator_in_completion
    if rows:
        yield Finding(
            f"the separator inside of {counted(len(rows), 'completion')}",
            rows,
            data={"separator": context.separator},
        )


def _trailing_blank(context: Context) -> Iterator[Finding]:
    rows = context.scan.trailing_blank
    if rows:
        yield Finding(f"a blank at the end of {counted(len(rows), 'prompt')}", rows)


def _answer_in_prompt(context: Context) -> Iterator[Finding]:
    rows = context.scan.answer_in_prompt
    if rows and context.task == "conditional":
        yield Finding(f"the answer inside of {counted(len(rows), 'prompt')}", rows)


def _pii(context: Context) -> Iterator[Finding]:
    yield from _sensitive(context, context.scan.pii, PII_KINDS, "personal data")


def _secret(context: Context) -> Iterator[Finding]:
    yield from _sensitive(context, context.scan.secret, SECRET_KINDS, "keys or passwords")


def _sensitive(context: Context, found: Sensitive, kinds: tuple[str, ...], what: str) -> Iterator[Finding]:
    if not found.rows:
        return
    rows = np.array(found.rows, dtype=np.int64)
    examples = [{**each, "row": context.intake.spool.label(each["row"])} for each in found.examples]
    yield Finding(
        f"what looks like {what} in {counted(len(rows), 'row')}",
        rows,
        data={
            "kinds": [kind for kind in kinds if found.kinds[kind]],
            "rows_by_kind": {kind: found.kinds[kind] for kind in kinds if found.kinds[kind]},
            "examples": examples,
        },
        fix=Fix("off", f"Drop {counted(len(rows), 'row')} with {what}", {"rows": len(rows)}, drop=rows),
    )


SEPARATOR_IN_COMPLETION = Check(
    "separator_in_completion", "a completion holds the separator", _separator_in_completion, added=True
)
TRAILING_BLANK = Check(
    "trailing_blank", "a prompt ends in a blank, before its separator", _trailing_blank, added=True
)
ANSWER_IN_PROMPT = Check(
    "answer_in_prompt",
    "conditional, and a completion of at least 4 characters stands in its prompt, both normalised",
    _answer_in_prompt,
    added=True,
)
PII = Check(
    "pii",
    "e-mail addresses, phone numbers, card numbers that pass Luhn's check, IBANs",
    _pii,
    "drop the rows",
    "off",
    pairs_only=False,
    added=True,
)
SECRET = Check(
    "secret",
    "keys by their known shapes, and passwords after their name",
    _secret,
    "drop the rows",
    "off",
    pairs_only=False,
    added=True,
)
