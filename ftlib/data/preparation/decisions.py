"""Which fixes are applied: by their defaults, by what the user said, or by asking."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, final

from ftlib.data.preparation.check import Check, Finding, Fix
from ftlib.data.preparation.checks import CHECKS
from ftlib.errors import ConfigError, DataError

__all__ = ["Ask", "Decisions", "yes_or_no"]

Ask = Callable[[str], bool]


@final
@dataclass(frozen=True)
class Decisions:
    """How to decide about fixes.

    Args:
        fixes: check -> apply its fix or not; overrides everything else.
        otherwise: for the other fixes: ``"default"`` as they are, ``"none"`` no optional one, or ``"ask"``
            about those that are on by default.
        ask: a question to an answer, for ``"ask"``.

    Raises:
        ConfigError: a name that is no check with an optional fix.
    """

    fixes: Mapping[str, bool] = field(default_factory=dict)
    otherwise: Literal["default", "none", "ask"] = "default"
    ask: Ask | None = None

    def __post_init__(self) -> None:
        optional = sorted({check.name for check in CHECKS if check.default in ("on", "off")})
        unknown = sorted(set(self.fixes) - set(optional))
        if unknown:
            raise ConfigError(f"prepare: expected fixes among {optional}, got {unknown[0]!r}.")

    def apply(self, check: Check, finding: Finding, fix: Fix) -> bool:
        """Whether the fix of this finding is applied."""
        if fix.default == "necessary":
            return True
        if check.name in self.fixes:
            return self.fixes[check.name]
        if self.otherwise == "none" or fix.default == "off":
            return False
        if self.otherwise == "ask" and self.ask is not None:
            return self.ask(f"{check.name}: {finding.message}. {fix.question}")
        return True


def yes_or_no(read: Callable[[], str], say: Callable[[str], None]) -> Ask:
    """Ask until the answer is empty, y, yes, n or no.

    Args:
        read: one line of the answer; empty text without a line end where there are no more.
        say: shows the question.
    """

    def ask(question: str) -> bool:
        while True:
            say(f"{question}? [Y/n] ")
            line = read()
            if not line:
                raise DataError(
                    f"expected an answer to {question!r}, got the end of the input; nothing was written. "
                    "Answer all questions, or take -q or --no.",
                    code="no_answer",
                )
            answer = line.strip().lower()
            if answer in ("", "y", "yes"):
                return True
            if answer in ("n", "no"):
                return False

    return ask
