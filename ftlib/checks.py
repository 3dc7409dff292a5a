"""What an option must be: a test, and the words for it. Checked where the option is taken.

So that ``lora(r="8")`` says: ``lora: r: expected a whole number >= 1, got '8'.``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, isinf, isnan
from numbers import Real
from os import PathLike
from typing import Any, final, get_args

from ftlib.errors import ConfigError

__all__ = [
    "COUNT",
    "INTEGER",
    "NAMES",
    "NATURAL",
    "PATH",
    "SWITCH",
    "TEXT",
    "Wanted",
    "check",
    "listed",
    "number",
    "one_of",
]


@final
@dataclass(frozen=True)
class Wanted:
    """What a value must be.

    Args:
        words: after "expected".
        holds: whether a value of any type is it; raises for none.
    """

    words: str
    holds: Callable[[Any], bool]

    @property
    def or_none(self) -> Wanted:
        """The same, or None."""
        return Wanted(f"{self.words}, or None", lambda value: value is None or self.holds(value))


def number(
    least: float = -inf, *, above: float | None = None, most: float | None = None, below: float = inf
) -> Wanted:
    """A number, no truth value and no text, within bounds: a finite one, unless `most` is infinite.

    Args:
        least: it, or more.
        above: more than it, in place of `least`.
        most: it, or less, in place of `below`.
        below: less than it.
    """

    def holds(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, Real):
            return False
        given = float(value)
        if isnan(given) or (isinf(given) and most != inf):
            return False
        large = given > above if above is not None else given >= least
        return large and (given <= most if most is not None else given < below)

    low = f">= {least:g}" if above is None else f"> {above:g}"
    low = "" if low == ">= -inf" else low
    high = f"< {below:g}" if most is None else f"<= {most:g}"
    bounds = " and ".join(bound for bound in (low, "" if high in ("< inf", "<= inf") else high) if bound)
    kind = "a number" if most == inf or "<" in bounds else "a finite number"
    return Wanted(f"{kind} {bounds}".strip(), holds)


def one_of(choices: Any) -> Wanted:
    """One of the values of a `Literal`."""
    names = get_args(choices)
    return Wanted(f"one of {list(names)}", lambda value: isinstance(value, str) and value in names)


def listed(what: str, holds: Callable[[Any], bool], *, least: int = 0) -> Wanted:
    """A list, tuple or set of at least so many things of one kind; text is none.

    Args:
        what: the things, after "a list of".
        holds: whether something is one.
        least: how many at least.
    """

    def all_are(value: Any) -> bool:
        several = isinstance(value, list | tuple | set | frozenset)
        return several and len(value) >= least and all(map(holds, value))

    return Wanted(f"a list of {what}{f', {least} or more' if least else ''}", all_are)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


INTEGER = Wanted("a whole number", _whole)
NATURAL = Wanted("a whole number >= 0", lambda value: _whole(value) and value >= 0)
COUNT = Wanted("a whole number >= 1", lambda value: _whole(value) and value >= 1)
SWITCH = Wanted("True or False", lambda value: isinstance(value, bool))
TEXT = Wanted("text", lambda value: isinstance(value, str))
PATH = Wanted("a path", lambda value: isinstance(value, str | PathLike))
NAMES = Wanted(
    "a dict of names to names",
    lambda value: isinstance(value, Mapping) and all(map(TEXT.holds, [*value, *value.values()])),
)


def check(where: str, options: Mapping[str, tuple[Any, Wanted]]) -> None:
    """Refuse the first option that is not what it must be.

    Args:
        where: the function or class that takes them.
        options: name -> what was given, what it must be.

    Raises:
        ConfigError: see above.

    Example:
        >>> check("lora", {"r": (8, COUNT), "alpha": (None, number(above=0).or_none)})
    """
    for name, (value, wanted) in options.items():
        if not wanted.holds(value):
            raise ConfigError(f"{where}: {name}: expected {wanted.words}, got {value!r:.200}.")
