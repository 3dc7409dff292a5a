"""Which format rows are in, for those who have rows and no source: see `ftlib.data.loading.choose`."""

from __future__ import annotations

from collections.abc import Sequence

from ftlib.data.formats import RULES, Rule, rule_named
from ftlib.data.loading.choose import choose
from ftlib.data.segments import Row

__all__ = ["RULES", "Rule", "detect", "rule_named"]


def detect(rows: Sequence[Row], *, file: str) -> Rule:
    """The rule that fits every one of `rows`, or failing that most of them.

    Raises:
        DataError: ``unknown_format`` with the keys found, or ``missing_column`` where only a
            completion is there.
    """
    rule = choose(rows, format="auto", columns={}, strict=False, mixed=False, file=file).rule
    assert rule is not None  # noqa: S101  only rows and mixed rows have none
    return rule
