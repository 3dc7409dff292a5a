r"""A small template language: text with slots in braces. Parsed here, never evaluated as code.

| slot | is |
|---|---|
| `{text_a}` | the column of that name |
| `{x\|truncate}`, `{x\|truncate:left}` | likewise; where the example is too long, cut at its end or start |
| `{x\|lower\|strip_punct}` | likewise, through filters from left to right |
| `{mask}`, `{mask:2}` | where the answer stands; of that many tokens |
| `{soft:20}`, `{soft:"It was"}`, `{soft@id:5}` | trainable tokens, from words; shared under one id |
| `{options}`, `{options:dashes}`, `{options:letters}` | the choices: `a, b, c`, or one a line |
| `{special:eos}` | a special token of the tokenizer |
| `{{`, `}}` | literal braces |
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, final

from ftlib.errors import ConfigError, DataError

__all__ = [
    "FILTERS",
    "SPECIALS",
    "Column",
    "Mask",
    "OptionStyle",
    "Options",
    "Pattern",
    "Side",
    "Slot",
    "Soft",
    "Special",
    "Words",
    "missing_column",
    "parse",
]

Side = Literal["left", "right"]
OptionStyle = Literal["commas", "dashes", "letters"]

FILTERS: Mapping[str, Callable[[str], str]] = {
    "lower": str.lower,
    "upper": str.upper,
    "capitalize": lambda text: text[:1].upper() + text[1:],
    "strip": str.strip,
    "strip_punct": lambda text: text.rstrip(string.punctuation + string.whitespace),
}
SPECIALS = ("bos", "eos", "sep", "cls", "pad", "unk", "mask")
_STYLES: tuple[OptionStyle, ...] = ("commas", "dashes", "letters")
_HEAD = re.compile(r'(?P<name>[^{}|:@"]+)(?:@(?P<share>\w+))?')
_ARGUMENT = re.compile(r':\s*(?:"(?P<words>[^"]*)"|(?P<bare>[\w-]+))\s*')


@final
@dataclass(frozen=True)
class Words:
    """The template's own text."""

    text: str


@final
@dataclass(frozen=True)
class Column:
    """A column of the row, through `filters`; `cut` is the side it may be shortened from."""

    name: str
    filters: tuple[str, ...] = ()
    cut: Side | None = None

    def of(self, value: object) -> str:
        """The text of a value."""
        text = str(value)
        for name in self.filters:
            text = FILTERS[name](text)
        return text


@final
@dataclass(frozen=True)
class Mask:
    """Where the answer stands: `count` tokens, or as many as each answer has."""

    count: int | None = None


@final
@dataclass(frozen=True)
class Soft:
    """Trainable tokens: `count` of them, or one per token of `words`; `share` names those that are shared."""

    count: int | None = None
    words: str | None = None
    share: str | None = None


@final
@dataclass(frozen=True)
class Options:
    """The choices there are."""

    style: OptionStyle = "commas"

    def of(self, choices: tuple[str, ...]) -> str:
        """The text of some choices.

        Example:
            >>> print(Options("letters").of(("yes", "no")))
            (A) yes
            (B) no
        """
        if self.style == "commas":
            return ", ".join(choices)
        marks = [f"({letter})" for letter in string.ascii_uppercase] if self.style == "letters" else ["-"]
        return "\n".join(f"{marks[k % len(marks)]} {choice}" for k, choice in enumerate(choices))


@final
@dataclass(frozen=True)
class Special:
    """A special token of the tokenizer, one of `SPECIALS`."""

    name: str


Slot = Words | Column | Mask | Soft | Options | Special
Kind = TypeVar("Kind", bound=Slot)


@final
@dataclass(frozen=True)
class Pattern:
    """A parsed template: its slots in order."""

    text: str
    slots: tuple[Slot, ...]

    def only(self, kind: type[Kind]) -> tuple[Kind, ...]:
        """The slots of one kind, in order."""
        return tuple(slot for slot in self.slots if isinstance(slot, kind))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it reads, each once."""
        return tuple(dict.fromkeys(slot.name for slot in self.only(Column)))


def parse(text: str) -> Pattern:
    """Parse a template.

    Raises:
        ConfigError: with the column of the fault: an open brace, an unknown filter, style or special
            token, a count that is none.

    Example:
        >>> parse("{text|lower} It was {mask}.").slots
        (Column(name='text', filters=('lower',), cut=None), Words(text=' It was '), Mask(count=None),
         Words(text='.'))
    """
    slots: list[Slot] = []
    words = ""
    at = 0
    while at < len(text):
        if text[at : at + 2] in ("{{", "}}"):
            words += text[at]
            at += 2
        elif text[at] == "}":
            raise _error(text, at, 'expected "{" before "}"', "write }} for a literal brace")
        elif text[at] == "{":
            if words:
                slots.append(Words(words))
                words = ""
            slot, at = _slot(text, at)
            slots.append(slot)
        else:
            words += text[at]
            at += 1
    return Pattern(text, (*slots, Words(words)) if words else tuple(slots))


def _slot(text: str, start: int) -> tuple[Slot, int]:
    """The slot whose brace opens at `start`, and the place after it."""
    head = _HEAD.match(text, start + 1)
    if head is None or not head["name"].strip():
        raise _error(text, start + 1, "expected a name after {", "write {{ for a literal brace")
    at = head.end()
    argument = _ARGUMENT.match(text, at)
    at = argument.end() if argument else at
    filters: list[tuple[str, str | None, int]] = []
    while text[at : at + 1] == "|":
        name = re.compile(r"\s*(\w+)\s*").match(text, at + 1)
        if name is None:
            raise _error(text, at + 1, "expected a filter after |", f"one of {[*FILTERS, 'truncate']}")
        option = _ARGUMENT.match(text, name.end())
        filters.append((name[1], option["bare"] if option else None, at + 1))
        at = option.end() if option else name.end()
    if text[at : at + 1] != "}":
        raise _error(text, at, 'expected "}"', "write {{ for a literal brace")
    return _made(text, start + 1, head, argument, filters), at + 1


def _made(
    text: str,
    at: int,
    head: re.Match[str],
    argument: re.Match[str] | None,
    filters: list[tuple[str, str | None, int]],
) -> Slot:
    name, share = head["name"].strip(), head["share"]
    words, bare = (argument["words"], argument["bare"]) if argument else (None, None)
    reserved = name in ("mask", "soft", "options", "special")
    if reserved and filters:
        raise _error(text, filters[0][2], f"expected no filter on {name!r}", "filters belong to columns")
    if share is not None and name != "soft":
        raise _error(text, at, f"expected no @ in {name!r}", "only {soft@id:5} is shared by an id")
    if words is not None and name != "soft":
        raise _error(text, at, f"expected no quoted text in {name!r}", 'only {soft:"It was"} takes words')
    if name == "mask":
        return Mask(None if bare is None else _count(text, at, bare))
    if name == "soft":
        if not words and bare is None:
            raise _error(text, at, "expected a count or words in soft", 'write {soft:20} or {soft:"It was"}')
        return Soft(None if bare is None else _count(text, at, bare), words, share)
    if name == "options":
        style = next((each for each in _STYLES if each == (bare or "commas")), None)
        if style is None:
            raise _error(text, at, f"expected a style of options, one of {list(_STYLES)}", f"got {bare!r}")
        return Options(style)
    if name == "special":
        if bare not in SPECIALS:
            raise _error(text, at, f"expected a special token, one of {list(SPECIALS)}", f"got {bare!r}")
        return Special(bare)
    if argument is not None:
        raise _error(text, at, f"expected a column, got {name!r} with an argument", "only filters follow")
    return _column(text, name, filters)


def _column(text: str, name: str, filters: list[tuple[str, str | None, int]]) -> Column:
    cut: Side | None = None
    kept = []
    for each, option, at in filters:
        if each == "truncate":
            if option not in (None, "left", "right"):
                raise _error(text, at, "expected truncate:left or truncate:right", f"got {option!r}")
            cut = "left" if option == "left" else "right"
        elif each not in FILTERS or option is not None:
            raise _error(text, at, f"expected a filter, one of {[*FILTERS, 'truncate']}", f"got {each!r}")
        else:
            kept.append(each)
    return Column(name, tuple(kept), cut)


def _count(text: str, at: int, bare: str) -> int:
    if not bare.isdecimal() or int(bare) < 1:
        raise _error(text, at, "expected a count of at least 1", f"got {bare!r}")
    return int(bare)


def _error(text: str, at: int, expected: str, fix: str) -> ConfigError:
    shown = text[max(0, at - 20) : at + 20]
    return ConfigError(f"template, column {at + 1}: {expected}, near {shown!r}; {fix}.")


def missing_column(row: Mapping[str, Any], name: str) -> DataError:
    """The error of a row that lacks a column which a template names."""
    return DataError(
        f"expected a column {name!r}, found {sorted(row)}. Map it, or change the template.",
        code="missing_column",
        column=name,
    )
