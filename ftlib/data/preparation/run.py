"""The checks in their order, each on the table left by the fixes accepted before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from ftlib.data.preparation.check import Check, Context, Finding, Fix, Level
from ftlib.data.preparation.checks import CHECKS, EDITS
from ftlib.data.preparation.decisions import Decisions
from ftlib.data.preparation.intake import take_in
from ftlib.data.preparation.settings import Settings
from ftlib.data.preparation.source import Part
from ftlib.data.preparation.table import Table
from ftlib.errors import ConfigError, DataError

__all__ = ["Action", "Outcome", "Reported", "examine"]


@final
@dataclass(frozen=True)
class Reported:
    """A finding with the check it comes from."""

    check: str
    level: Level
    finding: Finding


@final
@dataclass(frozen=True)
class Action:
    """A fix that was proposed, and whether it was applied.

    Args:
        check: whose fix.
        kind: ``"necessary"`` or ``"optional"``.
        default: ``"on"`` or ``"off"``.
        applied: it was.
        params: what it does, in detail.
    """

    check: str
    kind: str
    default: str
    applied: bool
    params: Mapping[str, Any]


@final
@dataclass
class Outcome:
    """What the checks have come to.

    Args:
        context: the last one: its table is the result.
        findings: in order.
        actions: in order.
        dropped: rows of the spool that went, by check.
    """

    context: Context
    findings: list[Reported] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    dropped: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    @property
    def applied(self) -> list[str]:
        """The checks whose fixes were applied, in order."""
        return [action.check for action in self.actions if action.applied]


def examine(parts: tuple[Part, ...], settings: Settings, decisions: Decisions, folder: Path) -> Outcome:
    """Read the source and run all checks.

    Args:
        parts: the source.
        settings: what the user asked for.
        decisions: about fixes.
        folder: for temporary files.

    Raises:
        DataError: see `take_in`; or nothing is left; or the rows are all alike.
        ConfigError: an option that makes no sense for these rows.
    """
    intake = take_in(parts, settings, folder)
    table = Table(intake.spool, np.ones(len(intake.spool), dtype=bool), surveys=intake.surveys)
    _refuse_useless(settings, intake.form)
    outcome = Outcome(
        Context(settings, intake, table, finished=lambda context: _finished(context, decisions))
    )
    for check in CHECKS:
        if check.pairs_only and not outcome.context.is_pairs:
            continue
        for finding in check.find(outcome.context):
            _settle(outcome, check, finding, decisions)
    return outcome


def _settle(outcome: Outcome, check: Check, finding: Finding, decisions: Decisions) -> None:
    """Note the finding, decide about its fix, and apply it."""
    outcome.findings.append(Reported(check.name, check.level(finding), finding))
    outcome.context = replace(outcome.context, **finding.known)
    fix = finding.fix
    if fix is None:
        return
    applied = decisions.apply(check, finding, fix)
    kind, default = ("necessary", "on") if fix.default == "necessary" else ("optional", fix.default)
    outcome.actions.append(Action(check.name, kind, default, applied, fix.params))
    if not applied:
        return
    outcome.context = _fixed(outcome.context, fix)
    if fix.drop is not None:
        outcome.dropped[check.name] = fix.drop
        if not len(outcome.context.table):
            raise DataError(
                f"expected rows, none are left after {check.name}. {finding.message}.",
                code="empty_data",
                file=outcome.context.intake.facts.file,
            )


def _fixed(context: Context, fix: Fix) -> Context:
    table = context.table
    if fix.drop is not None:
        table = table.dropped(fix.drop)
    for edit in fix.edits:
        table = table.edited(edit)
    return replace(context, table=table, **fix.known)


def _finished(context: Context, decisions: Decisions) -> Table:
    """The table after the edits still to come, as far as they are decided without asking."""
    quiet = Decisions(decisions.fixes, "none" if decisions.otherwise == "none" else "default")
    for check in EDITS:
        if check.pairs_only and not context.is_pairs:
            continue
        for finding in check.find(context):
            context = replace(context, **finding.known)
            if finding.fix is not None and quiet.apply(check, finding, finding.fix):
                context = _fixed(context, finding.fix)
    return context.table


def _refuse_useless(settings: Settings, form: str) -> None:
    """Options about prompts and completions in text say nothing about other rows."""
    given = {
        "task": settings.task,
        "ending": settings.ending,
        "group": settings.group,
        "positive_class": settings.positive_class,
    }
    useless = [name for name, value in given.items() if value is not None]
    if form != "pairs" and useless:
        raise ConfigError(f"prepare: {useless[0]} has no effect on {form} rows. Leave it out.")
