"""Templates in words: a prompt and a target, each with slots for columns; FLAN's collections of them.

Source: Longpre et al. 2023 for FLAN: a blank line between input and target, two between examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from ftlib.data.instructions.choice import draw, row_id
from ftlib.data.instructions.layout import Instructed, prompt_text
from ftlib.data.instructions.task import column, is_task, read_task
from ftlib.data.pattern import (
    Column,
    Mask,
    Options,
    OptionStyle,
    Pattern,
    Soft,
    Special,
    Words,
    missing_column,
    parse,
)
from ftlib.data.segments import Row, Segment
from ftlib.errors import ConfigError, DataError

__all__ = ["Shots", "Worded", "flan", "worded"]

CUT = "|||"
_TASK = ("instruction", "input", "output", "system")
_OTHER_NAMES = {
    "inputs": ("inputs", "inputs_pretokenized", "prompt"),
    "targets": ("targets", "targets_pretokenized", "completion"),
    "answer": ("answer", "completion"),
}
_CHOICES = ("options", "choices", "answer_choices")


@final
@dataclass(frozen=True)
class Shots:
    """Solved examples before the question, drawn from `pool` by seed and row; never the row itself."""

    pool: tuple[Mapping[str, Any], ...]
    count: int
    between: str = "\n\n\n"


@final
@dataclass(frozen=True)
class Worded:
    """See `worded` and `flan`.

    Args:
        patterns: (prompt, target) of each template; a row takes one by hash of seed and row.
        separator: between the two, part of the prompt.
        joiner: between instruction and input, where a template has a slot for the instruction alone.
        shots: solved examples, or None.
        seed: of the choices.
    """

    patterns: tuple[tuple[Pattern, Pattern], ...]
    separator: str = ""
    joiner: str = "\n"
    shots: Shots | None = None
    seed: int = 0

    def __call__(self, row: Row) -> Instructed:
        """The prompt with its examples, and the target."""
        key = row_id(row, self._columns)
        prompt, target = self.patterns[draw(self.seed, key) % len(self.patterns)]
        asked = self._rendered(prompt, row)
        parts = self._before(prompt, row)
        if self.shots is not None:
            for shot in self._drawn(self.shots, key, prompt_text(asked), prompt):
                answered = self._target(target, shot)
                if answered is None:
                    raise DataError(f"expected solved examples in the pool, got {shot!r:.80}.")
                parts += self._rendered(prompt, shot)
                parts.append(Segment(self.separator + answered + self.shots.between, "prompt"))
        parts += asked
        text = prompt_text(parts)
        turns = ({"role": "user", "content": text},)
        if self.separator:
            parts.append(Segment(self.separator, "prompt"))
        return Instructed(tuple(parts), self._target(target, row), turns)

    def row(self, prompt: str) -> Row:
        """A bare prompt fills the one column that every template reads."""
        columns = self._columns
        if len(columns) != 1:
            raise DataError(
                f"expected a row with the columns {sorted(columns)}, got a bare prompt. "
                "Give a dict with them."
            )
        return {next(iter(columns)): prompt}

    @property
    def _columns(self) -> frozenset[str]:
        """The columns that prompts read."""
        return frozenset(name for prompt, _ in self.patterns for name in prompt.columns)

    def _before(self, pattern: Pattern, row: Row) -> list[Segment]:
        """The row's system text, where the template has no slot for it. Nothing a row says is lost."""
        if not is_task(row):
            return []
        task = read_task(row)
        if task.history:
            raise DataError(
                "expected one question and its answer, got earlier turns, for which template text has no "
                "place. Use instruction('alpaca') or formatters.chat().",
                column="history",
            )
        if task.system is None or "system" in pattern.columns:
            return []
        return [Segment(f"{task.system}\n\n", "prompt")]

    def _drawn(self, shots: Shots, key: str, asked: str, prompt: Pattern) -> list[Mapping[str, Any]]:
        """`shots.count` examples that ask something else."""
        order = sorted(range(len(shots.pool)), key=lambda k: draw(self.seed, f"{key}:{k}"))
        others = (shots.pool[k] for k in order if prompt_text(self._rendered(prompt, shots.pool[k])) != asked)
        return [example for _, example in zip(range(shots.count), others, strict=False)]

    def _rendered(self, pattern: Pattern, row: Row) -> list[Segment]:
        """The prompt as segments: the template's own words may hold control tokens, data may not."""
        parts = []
        for slot in pattern.slots:
            if isinstance(slot, Words):
                parts.append(Segment(slot.text, "prompt", control=True))
            elif isinstance(slot, Options):
                parts.append(Segment(slot.of(_choices(row)), "prompt"))
            elif isinstance(slot, Column):
                parts.append(Segment(slot.of(self._value(row, slot.name, pattern)), "prompt", cut=slot.cut))
        return parts

    def _target(self, pattern: Pattern, row: Row) -> str | None:
        """The target; None where the row lacks a column of it."""
        text = ""
        for slot in pattern.slots:
            if isinstance(slot, Words):
                text += slot.text
            elif isinstance(slot, Column):
                value = _found(row, slot.name)
                if value is None or value == "":
                    return None
                text += slot.of(value)
        return text

    def _value(self, row: Row, name: str, pattern: Pattern) -> Any:
        value = _found(row, name)
        if name == "instruction" and "input" not in pattern.columns and "context" not in pattern.columns:
            return read_task(row).joined(self.joiner)
        if value is None and name in ("input", "context", "system"):
            return ""  # what a row may lack
        if value is None:
            raise missing_column(row, name)
        return value


def worded(
    templates: str | Sequence[str],
    *,
    separator: str = "",
    joiner: str = "\n",
    shots: Shots | None = None,
    seed: int = 0,
) -> Worded:
    """Templates in the language of `ftlib.data.pattern`.

    Args:
        templates: one or several, of which a row takes one by hash of seed and row id. Generation begins
            at ``|||``, or where there is none at the last slot, which then ends the template.
        separator: text between prompt and target, part of the prompt.
        joiner: between instruction and input, where a template has a slot for the instruction alone.
        shots: solved examples before each question.
        seed: of the choices.

    Raises:
        ConfigError: a template that does not parse, says nowhere where generation begins, or has slots
            of another use.
    """
    texts = [templates] if isinstance(templates, str) else list(templates)
    if not texts:
        raise ConfigError("instruction: expected at least one template, got none.")
    if shots is not None and not 1 <= shots.count < len(shots.pool):
        raise ConfigError(
            f"instruction: expected a pool of more examples than the {shots.count} shown, since a row never "
            f"sees itself, got {len(shots.pool)}."
        )
    return Worded(tuple(map(_split, texts)), separator, joiner, shots, seed)


def flan(
    templates: str | Sequence[str] = "{inputs}|||{targets}",
    *,
    options: OptionStyle = "dashes",
    shots: int = 0,
    pool: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
) -> Worded:
    """FLAN's templates: a blank line before the target, two between examples.

    ``{options_}`` is FLAN's slot for choices, from the column `options`: a line ``OPTIONS:``, then one
    choice a line.

    Args:
        templates: as for `worded`, such as ``"{premise} So {hypothesis}? {options_}|||{answer}"``.
        options: how ``{options_}`` shows them: ``"dashes"``, or ``"letters"`` for (A), (B).
        shots: solved examples before each question.
        pool: rows to draw them from.
        seed: of the choices.
    """
    texts = [templates] if isinstance(templates, str) else templates
    listed = [text.replace("{options_}", f"OPTIONS:\n{{options:{options}}}") for text in texts]
    if bool(shots) != bool(pool):
        raise ConfigError(f"flan: expected shots and a pool together, got {shots} and {len(pool)} rows.")
    return worded(listed, separator="\n\n", shots=Shots(tuple(pool), shots) if shots else None, seed=seed)


def _split(text: str) -> tuple[Pattern, Pattern]:
    """Prompt and target of one template."""
    head, cut, tail = text.partition(CUT)
    if cut:
        if CUT in tail:
            raise ConfigError(f"instruction: expected one {CUT} in the template, got several: {text!r:.80}.")
        prompt, target = parse(head), parse(tail)
    else:
        whole = parse(text)
        if not whole.slots or not isinstance(whole.slots[-1], Column):
            raise ConfigError(
                f"instruction: expected a template that ends in the slot of its answer, or has {CUT} where "
                f"generation begins, got {text!r:.80}. The names known are alpaca, dolly, flan, p3, "
                "super_natural_instructions."
            )
        prompt, target = Pattern(text, whole.slots[:-1]), Pattern(text, whole.slots[-1:])
    if not target.columns:
        raise ConfigError(f"instruction: expected a slot in the target of the template {text!r:.80}.")
    for pattern, refused in ((prompt, (Mask, Soft, Special)), (target, (Mask, Soft, Special, Options))):
        for slot in pattern.slots:
            if isinstance(slot, refused):
                raise ConfigError(
                    f"instruction: expected columns and options in the template, got {slot}. Masks and soft "
                    "tokens belong to formatters.cloze()."
                )
    return prompt, target


def _found(row: Row, name: str) -> Any:
    """A column under its own name, under another spelling of it, or as a part of the task."""
    value = column(row, *(each.casefold() for each in _OTHER_NAMES.get(name, (name,))))
    return getattr(read_task(row), name) if value is None and name in _TASK and is_task(row) else value


def _choices(row: Row) -> tuple[str, ...]:
    value = column(row, *_CHOICES)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(
            f"expected choices for the slot of options, found {sorted(row)}.",
            code="missing_column",
            column=_CHOICES[0],
        )
    return tuple(map(str, value))
