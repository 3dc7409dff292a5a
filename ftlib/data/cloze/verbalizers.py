"""Verbalizers: which words of the vocabulary stand for which class.

| verbalizer | a class is |
|---|---|
| `Manual` | one word or phrase |
| `MultiWord` | several, their log-scores reduced to one |
| `Soft` | one, whose row of the language model's head is trained |
| `Generation` | a text that the model writes and that is read back |

`ftlib.evaluation.find_words` finds the words of a `MultiWord` by what a model says of labelled rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, final, runtime_checkable

from ftlib.errors import ConfigError

__all__ = ["Generation", "Manual", "MultiWord", "Reduce", "Soft", "Verbalizer"]

Reduce = Literal["mean", "max", "logsumexp"]


@runtime_checkable
class Verbalizer(Protocol):
    """Classes in words. The order of the classes is that of `words`."""

    @property
    def words(self) -> Mapping[str, tuple[str, ...]]:
        """Class -> its words, at least one."""

    @property
    def reduce(self) -> Reduce:
        """How the log-scores of several words of one class become one."""


@final
@dataclass(frozen=True, init=False)
class Manual:
    """One word or phrase per class, chosen by hand.

    Args:
        words: class -> word.

    Raises:
        ConfigError: fewer than two classes, or a class without a word.

    Example:
        >>> Manual({"good": "great", "bad": "terrible"}).words
        {'good': ('great',), 'bad': ('terrible',)}
    """

    pairs: tuple[tuple[str, tuple[str, ...]], ...]

    def __init__(self, words: Mapping[str, str]) -> None:
        object.__setattr__(self, "pairs", _checked({label: [word] for label, word in words.items()}))

    @property
    def words(self) -> Mapping[str, tuple[str, ...]]:
        """See `Verbalizer`."""
        return dict(self.pairs)

    @property
    def reduce(self) -> Reduce:
        """Nothing to reduce."""
        return "mean"


@final
@dataclass(frozen=True, init=False)
class MultiWord:
    """Several words per class.

    Args:
        words: class -> words.
        reduce: the class's log-score is the ``"mean"``, the ``"max"`` or the ``"logsumexp"`` of theirs.

    Raises:
        ConfigError: as for `Manual`, or an unknown `reduce`.
    """

    pairs: tuple[tuple[str, tuple[str, ...]], ...]
    reduce: Reduce = "mean"

    def __init__(self, words: Mapping[str, Sequence[str]], reduce: Reduce = "mean") -> None:
        if reduce not in ("mean", "max", "logsumexp"):
            raise ConfigError(f"MultiWord: expected reduce as 'mean', 'max' or 'logsumexp', got {reduce!r}.")
        object.__setattr__(self, "pairs", _checked(words))
        object.__setattr__(self, "reduce", reduce)

    @property
    def words(self) -> Mapping[str, tuple[str, ...]]:
        """See `Verbalizer`."""
        return dict(self.pairs)


@final
@dataclass(frozen=True, init=False)
class Soft:
    """One new token per class, whose row of the head starts as the mean of a word's rows and is trained.

    Args:
        words: class -> the word to start from.

    Raises:
        ConfigError: as for `Manual`.
    """

    starts: tuple[tuple[str, str], ...]

    def __init__(self, words: Mapping[str, str]) -> None:
        _checked({label: [word] for label, word in words.items()})
        object.__setattr__(self, "starts", tuple(words.items()))

    @property
    def words(self) -> Mapping[str, tuple[str, ...]]:
        """The new tokens."""
        return {label: (f"<|class_{number}|>",) for number, (label, _) in enumerate(self.starts)}

    @property
    def reduce(self) -> Reduce:
        """Nothing to reduce."""
        return "mean"


@final
@dataclass(frozen=True, init=False)
class Generation:
    """The model writes the answer, which is read back. Trained as any completion, with its EOS.

    Args:
        words: class -> the text to write.

    Raises:
        ConfigError: as for `Manual`, or a text that another one begins with.

    Example:
        >>> Generation({"yes": "it follows", "no": "it does not"}).read(" It follows. Because")
        'yes'
    """

    pairs: tuple[tuple[str, tuple[str, ...]], ...]

    def __init__(self, words: Mapping[str, str]) -> None:
        pairs = _checked({label: [word] for label, word in words.items()})
        texts = [_plain(word) for _, (word,) in pairs]
        if any(a != b and a.startswith(b) for a in texts for b in texts) or len(set(texts)) < len(texts):
            raise ConfigError(
                f"Generation: expected texts of which none begins another, got {list(words.values())}."
            )
        object.__setattr__(self, "pairs", pairs)

    @property
    def words(self) -> Mapping[str, tuple[str, ...]]:
        """See `Verbalizer`."""
        return dict(self.pairs)

    @property
    def reduce(self) -> Reduce:
        """Nothing to reduce."""
        return "mean"

    def read(self, written: str) -> str | None:
        """The class of a written text: the one whose text it begins with, case aside; or None."""
        return next(
            (label for label, (word,) in self.pairs if _plain(written).startswith(_plain(word))), None
        )


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _checked(words: Mapping[str, Sequence[str]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if len(words) < 2:
        raise ConfigError(f"verbalizer: expected at least two classes, got {dict(words)}.")
    for label, listed in words.items():
        if isinstance(listed, str) or not listed or not all(map(str.strip, listed)):
            raise ConfigError(
                f"verbalizer: expected words for the class {label!r}, got {listed!r}. Give at least one, "
                "not blank."
            )
    return tuple((label, tuple(listed)) for label, listed in words.items())
