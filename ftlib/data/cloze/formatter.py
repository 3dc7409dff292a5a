"""Rows as cloze questions: a template with a gap, and one candidate per word of every class.

A row becomes `Answers`: its candidates as continuations of one prompt, each with the index of its `class`
and its size in `bytes`, and, where the row has a label, its `rank` (1 is right, 2 is wrong). So a cloze
question trains by scores, and as well by likelihood or by preference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from ftlib.data.cloze.check import check_words, word_ids
from ftlib.data.cloze.verbalizers import Generation, Soft, Verbalizer
from ftlib.data.pattern import Column, Mask, Options, Pattern, Slot, Special, Words, missing_column
from ftlib.data.pattern import Soft as SoftSlot
from ftlib.data.segments import Answers, Row, Segment, Segments
from ftlib.data.tokens import TokenBackend
from ftlib.errors import ConfigError, DataError

__all__ = ["PROBABILITIES", "Cloze", "soft_tokens"]

PROBABILITIES = "probabilities"  # column: one number per class, for training on what another model says


@final
@dataclass(frozen=True)
class Cloze:
    """See `ftlib.formatters.cloze`.

    Args:
        pattern: with exactly one mask.
        verbalizer: classes in words.
        label: column of the class.
        specials: name -> text of the special tokens that the pattern names; filled in by `bound`.
        sizes: tokens of each candidate; filled in by `bound`.
    """

    pattern: Pattern
    verbalizer: Verbalizer
    label: str = "label"
    specials: tuple[tuple[str, str], ...] | None = None
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        masks = self.pattern.only(Mask)
        if len(masks) != 1:
            raise ConfigError(
                f"cloze: expected one {{mask}} in the template, got {len(masks)}: {self.pattern.text!r:.80}."
            )
        if isinstance(self.verbalizer, Generation) and self.after:
            raise ConfigError(
                "cloze: expected {mask} at the end of a template whose answer is generated, got "
                f"{self.pattern.text!r:.80}."
            )

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes in order."""
        return tuple(self.verbalizer.words)

    @property
    def candidates(self) -> tuple[tuple[int, str], ...]:
        """(class, text) of each word, the blank before the mask included."""
        blank = " " if self.spaced and not isinstance(self.verbalizer, Soft) else ""
        listed = enumerate(self.verbalizer.words.values())
        return tuple((number, blank + word) for number, words in listed for word in words)

    @property
    def spaced(self) -> bool:
        """Whether a blank stands before the mask: it goes to the words, since tokens hold it there."""
        before = self.before
        return bool(before) and isinstance(before[-1], Words) and before[-1].text.endswith(" ")

    @property
    def before(self) -> tuple[Any, ...]:
        """The slots before the mask."""
        return self.pattern.slots[: self._mask]

    @property
    def after(self) -> tuple[Any, ...]:
        """The slots after the mask."""
        return self.pattern.slots[self._mask + 1 :]

    def bound(self, backend: TokenBackend) -> Cloze:
        """The same for one tokenizer: special tokens and sizes of words filled in, words checked.

        Raises:
            ConfigError: a word that this tokenizer cannot tell from others, or a special token it lacks.
        """
        tokenizer = backend.tokenizer
        made = self.counted(tokenizer)
        named = {}
        for slot in self.pattern.only(Special):
            token = getattr(tokenizer, f"{slot.name}_token")
            if token is None:
                raise ConfigError(
                    f"cloze: expected a {slot.name} token for {{special:{slot.name}}}, got none."
                )
            named[slot.name] = str(token)
        made = replace(made, specials=tuple(named.items()))
        missing = [token for token in soft_tokens(made) if token not in tokenizer.get_added_vocab()]
        if missing:
            raise ConfigError(
                f"cloze: expected a tokenizer and a model with the soft tokens {missing[:3]}, got one "
                "without. ftlib.models.add_soft_tokens makes them, and ClozeClassifier calls it."
            )
        if not isinstance(self.verbalizer, Soft):
            check_words(backend, self.labels, self.candidates, self.pattern.only(Mask)[0].count)
        sizes = map(len, word_ids(backend, [text for _, text in self.candidates]))
        return replace(made, sizes=tuple(sizes))

    def counted(self, tokenizer: PreTrainedTokenizerBase) -> Cloze:
        """The same with the number of its soft tokens filled in, where they stand for words."""
        slots = tuple(_counted(slot, tokenizer) for slot in self.pattern.slots)
        return replace(self, pattern=Pattern(self.pattern.text, slots))

    def __call__(self, row: Row) -> Answers | Segments:
        """The row's candidates; where the answer is generated, the right one alone."""
        before = self._rendered(self.before, row)
        if before and self.spaced:
            before[-1] = replace(before[-1], text=before[-1].text[:-1])
        gold = self.class_of(row)
        if isinstance(self.verbalizer, Generation):
            if gold is None:
                return Segments(tuple(before))
            answer = self.candidates[gold][1]
            return Segments((*before, Segment(answer, "completion", boundary=True)))
        after = self._rendered(self.after, row)
        after = [replace(p, role="tail", weight=0.0, boundary=k == 0) for k, p in enumerate(after)]
        control = isinstance(self.verbalizer, Soft)
        examples = tuple(
            Segments(
                (*before, Segment(text, "completion", control=control, boundary=True), *after),
                eos=False,
                closed=True,
            )
            for _, text in self.candidates
        )
        classes = [number for number, _ in self.candidates]
        extras = {
            "class": tuple(map(float, classes)),
            "bytes": tuple(float(len(text.encode())) for _, text in self.candidates),
        }
        if gold is not None:
            extras["rank"] = tuple(1.0 if number == gold else 2.0 for number in classes)
        if row.get(PROBABILITIES) is not None:
            shares = self._shares(row[PROBABILITIES])
            extras["probability"] = tuple(shares[number] for number in classes)
        return Answers(examples, extras)

    def row(self, prompt: str) -> Row:
        """A bare prompt fills the one column that the template reads."""
        if len(self.pattern.columns) != 1:
            raise DataError(
                f"expected a row with the columns {list(self.pattern.columns)}, got a bare prompt. "
                "Give a dict with them."
            )
        return {self.pattern.columns[0]: prompt}

    @property
    def _mask(self) -> int:
        return next(k for k, slot in enumerate(self.pattern.slots) if isinstance(slot, Mask))

    def _rendered(self, slots: Sequence[Any], row: Row) -> list[Segment]:
        """Slots as segments: the template's own words may hold control tokens, data may not."""
        parts = []
        named = dict(self.specials or ())
        for slot in slots:
            if isinstance(slot, Words):
                parts.append(Segment(slot.text, "prompt", control=True))
            elif isinstance(slot, Options):
                words = tuple(words[0] for words in self.verbalizer.words.values())
                parts.append(Segment(slot.of(words), "prompt"))
            elif isinstance(slot, Column):
                parts.append(Segment(slot.of(_value(row, slot.name)), "prompt", cut=slot.cut))
            elif isinstance(slot, Special):
                if slot.name not in named:
                    raise ConfigError(
                        "cloze: special tokens need a tokenizer. Give the formatter to an Encoder."
                    )
                parts.append(Segment(named[slot.name], "prompt", control=True))
            elif isinstance(slot, SoftSlot):
                parts.append(Segment("".join(_tokens(self.pattern, slot)), "prompt", control=True))
        return parts

    def class_of(self, row: Row) -> int | None:
        """The class of a row, by its name or its number; None without a label.

        Raises:
            DataError: ``unknown_label``.
        """
        value = row.get(self.label)
        if value is None:
            return None
        if str(value) in self.labels:
            return self.labels.index(str(value))
        numbers_are_names = all(label.lstrip("-").isdigit() for label in self.labels)
        if isinstance(value, int) and not numbers_are_names and 0 <= value < len(self.labels):
            return int(value)
        raise DataError(
            f"expected one of the classes {list(self.labels)}, got {value!r:.80}. Give the verbalizer words "
            "for every class of the data.",
            code="unknown_label",
            column=self.label,
        )

    def _shares(self, values: Any) -> list[float]:
        shares = [float(value) for value in values]
        if len(shares) != len(self.labels) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-3:
            raise DataError(
                f"expected one probability per class ({len(self.labels)}), their sum 1, got {values!r:.80}.",
                column=PROBABILITIES,
            )
        return shares


def soft_tokens(formatter: Cloze) -> dict[str, str | None]:
    """The new tokens a bound formatter needs -> the text whose embeddings they start from, in order."""
    needed: dict[str, str | None] = {}
    for slot in formatter.pattern.only(SoftSlot):
        needed.update(dict.fromkeys(_tokens(formatter.pattern, slot), slot.words))
    if isinstance(formatter.verbalizer, Soft):
        for (token,), (_, word) in zip(
            formatter.verbalizer.words.values(), formatter.verbalizer.starts, strict=True
        ):
            needed[token] = word
    return needed


def _tokens(pattern: Pattern, slot: SoftSlot) -> list[str]:
    """The new tokens of one slot: shared where slots have one id."""
    if slot.count is None:
        raise ConfigError("cloze: soft tokens from words need a tokenizer. Use ClozeClassifier.")
    name = slot.share or next(k for k, each in enumerate(pattern.slots) if each is slot)
    return [f"<|soft_{name}_{number}|>" for number in range(slot.count)]


def _counted(slot: Slot, tokenizer: PreTrainedTokenizerBase) -> Slot:
    if not isinstance(slot, SoftSlot) or slot.count is not None:
        return slot
    return replace(slot, count=len(tokenizer(f" {slot.words}", add_special_tokens=False)["input_ids"]))


def _value(row: Row, name: str) -> Any:
    value = row.get(name)
    if value is None:
        raise missing_column(row, name)
    return value
