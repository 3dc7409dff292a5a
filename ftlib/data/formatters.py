"""Formatters: a row to the text that is trained on, its parts marked by their role in the loss.

A formatter decides the text, `train_on` of the encoder decides what of it is learned, and the encoder
alone tokenises. Any function from a row to `Segments`, `Conversation` or `Answers` is a formatter too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

from ftlib.data.as_given import TokenRows, WeightedSegments
from ftlib.data.cells import has
from ftlib.data.cloze import Cloze, Manual, Verbalizer
from ftlib.data.instructions import (
    Instruction,
    Kind,
    alpaca,
    dolly,
    flan,
    p3,
    super_natural_instructions,
    worded,
)
from ftlib.data.layouts import Chat, ControlPolicy, EosPolicy, PromptCompletion, Text, one_of
from ftlib.data.messages import ROLES
from ftlib.data.pattern import parse
from ftlib.data.preferences import canonical_pair, canonical_ranked, ranks_of
from ftlib.data.segments import (
    Answers,
    Conversation,
    Formatter,
    Made,
    Row,
    Segments,
    Skipped,
    Tokens,
)
from ftlib.data.spellings import is_comparison, is_pair
from ftlib.errors import ConfigError, DataError

__all__ = [
    "Chat",
    "Preference",
    "PromptCompletion",
    "Text",
    "by_columns",
    "chat",
    "cloze",
    "instruction",
    "preference",
    "prompt_completion",
    "segments",
    "text",
    "tokens",
]


@final
@dataclass(frozen=True)
class Preference:
    """See `preference`."""

    base: Formatter | Callable[[Row], Made] | None = None

    def __call__(self, row: Row) -> Made:
        """Every answer of the row laid out by the base; a row without answers gives the prompt alone."""
        if not is_comparison(row):
            return self._alone(row)
        # Rows from `load_records` are canonical already, which changes nothing then.
        found = canonical_pair(row, ROLES) if is_pair(row) else canonical_ranked(row, ROLES)
        extras: dict[str, tuple[float, ...]] = {}
        if "chosen" in found:
            answers = [found["chosen"], found["rejected"]]
            if "margin" in found:  # the margin of a pair is the difference of the two numbers
                extras["margin"] = (found["margin"], 0.0)
        else:
            answers = found["answers"]
            ranks = ranks_of(found)
            if ranks is not None:
                order = sorted(range(len(ranks)), key=ranks.__getitem__)  # best first; ties keep their order
                answers, extras["rank"] = [answers[k] for k in order], tuple(ranks[k] for k in order)
        others = {name: value for name, value in row.items() if name not in _LAID_OUT}
        prompt = {name: found[name] for name in ("prompt", "tools") if name in found}
        rows = [
            {**others, **prompt, ("completion" if "prompt" in found else "text"): answer}
            for answer in answers
        ]
        return Answers(tuple(map(self._alone, rows)), extras)

    def row(self, prompt: str) -> Row:
        """The row of a bare prompt."""
        return self.base.row(prompt) if isinstance(self.base, Formatter) else {"prompt": prompt}

    def based(self, made: Made) -> Preference:
        """The same with a base: the one that laid out `made`."""
        if self.base is not None or isinstance(made, Skipped | Tokens):
            return self
        example = made.examples[0] if isinstance(made, Answers) else made
        if isinstance(example, Conversation):
            return replace(self, base=chat())
        return replace(self, base=text() if example.parts[0].role == "text" else prompt_completion())

    def _alone(self, row: Row) -> Segments | Conversation:
        made: Made = (self.base or _of_one_answer(row))(row)
        if isinstance(made, Answers | Skipped | Tokens):
            raise ConfigError(
                "preference: expected a base that lays out one answer, such as prompt_completion() or "
                f"chat(), got {self.base!r:.80}."
            )
        return made


# What the base of a preference sees in its canonical form alone, or not at all.
_LAID_OUT = frozenset({"prompt", "completion", "messages", "text", "tools"})


def text(column: str = "text", *, eos: EosPolicy = "append", control: ControlPolicy = "text") -> Formatter:
    """Plain text, all of it learned.

    Args:
        column: where the text stands.
        eos: ``"append"`` ends each text in one EOS token, ``"none"`` adds none.
        control: ``"text"`` keeps ``<|im_end|>`` and the like in the data ordinary characters;
            ``"parse"`` reads them as control tokens, for text that was rendered by a template.
    """
    return Text(column, eos, control)


def prompt_completion(
    *, separator: str = "", ending: str | None = None, control: ControlPolicy = "text"
) -> Formatter:
    """A prompt that is read and a completion that is learned, both strings; no chat template.

    Args:
        separator: text between the two, part of the prompt, so inference uses it too.
        ending: text after the completion, learned. A trained EOS follows in any case.
        control: as in `text`.
    """
    return PromptCompletion(separator, ending, control)


def chat(*, template: str | None = None, system: str | None = None) -> Formatter:
    """Messages rendered by the tokenizer's own chat template.

    Rows hold `messages`, or `prompt` and `completion` as message lists, and perhaps `tools`.

    Args:
        template: template text used in place of the tokenizer's.
        system: `None` leaves the system text to the template, ``""`` asks for none, other text is
            put before conversations that bring no system message.
    """
    return Chat(template, system)


def instruction(
    template: str | Sequence[str] | Kind = "alpaca",
    *,
    render: Literal["text", "chat"] = "text",
    joiner: str = "\n",
    seed: int = 0,
) -> Formatter:
    r"""Instruction data under a published layout or one of your own.

    Args:
        template: "alpaca", "dolly", "flan", "p3" or "super_natural_instructions"; or template text, such as
            ``"Q: {question}\nA: {answer}"``, or several of which a row takes one (see
            `instructions.worded`); or what a function of `ftlib.data.instructions` makes, with the options
            of its kind: `promptsource` is there too.
        render: ``"text"``, with a trained EOS after the answer; or ``"chat"``: the row as messages, which
            the model's own chat template renders.
        joiner: between instruction and input, where they become one text.
        seed: of the choices that a kind makes by hash of seed and row id.

    Raises:
        ConfigError: unknown options, options without effect, or a template that does not parse.
    """
    one_of("instruction", "render", render, ("text", "chat"))
    made = _kind(template, joiner, seed)
    return Chat(kind=made) if render == "chat" else Instruction(made)


def _kind(template: str | Sequence[str] | Kind, joiner: str, seed: int) -> Kind:
    named: Mapping[str, Callable[[], Kind]] = {
        "alpaca": lambda: alpaca(joiner=joiner),
        "dolly": lambda: dolly(joiner=joiner),
        "flan": lambda: flan(seed=seed),
        "p3": p3,
        "super_natural_instructions": lambda: super_natural_instructions(seed=seed),
    }
    if isinstance(template, str) and template in named:
        return named[template]()
    if isinstance(template, str | list | tuple):
        return worded(template, joiner=joiner, seed=seed)
    if not isinstance(template, Kind):
        raise ConfigError(
            f"instruction: expected a name of {list(named)}, template text, or a kind such as "
            f"ftlib.data.instructions.flan(...), got {template!r:.80}."
        )
    if (joiner, seed) != ("\n", 0):
        raise ConfigError("instruction: joiner and seed have no effect on a kind. Give them to its function.")
    return template


def cloze(pattern: str, verbalizer: Verbalizer | Mapping[str, str], *, label: str = "label") -> Cloze:
    """Rows as questions with a gap, to be answered by one of the words that stand for the classes.

    Args:
        pattern: a template in the language of `ftlib.data.pattern`, such as ``"{text} It was {mask}."``.
        verbalizer: one of `ftlib.data.cloze`, or a mapping from each class to its word.
        label: column of the class; a row without it is to be answered.

    Raises:
        ConfigError: a template that does not parse, or has not exactly one mask.
    """
    return Cloze(parse(pattern), Manual(verbalizer) if isinstance(verbalizer, Mapping) else verbalizer, label)


def preference(base: Formatter | Callable[[Row], Made] | None = None) -> Formatter:
    """Pairs and ranked answers: one prompt, and each answer laid out as it would be by itself.

    Rows hold `chosen` and `rejected`, or `answers` best first or with `ranks` or `scores`, in any of the
    spellings that `load_records` reads. A pair's `margin` becomes the numbers ``[margin, 0]`` of its two
    answers, ranks the number `rank` of each.

    Args:
        base: lays out one answer from a row with `prompt` and `completion`, or with the whole as `text`
            where pairs of strings have no prompt. `None` picks `prompt_completion`, `chat` or `text`.
    """
    return Preference(base)


def segments() -> Formatter:
    """Text that is final, in stretches with a loss weight each: rows with `segments`.

    Nothing is put before, between or after the stretches, and control tokens written in them are meant as
    such, so a text that should end in EOS ends in it as written.
    """
    return WeightedSegments()


def tokens() -> Formatter:
    """Token ids as they are: rows with `input_ids` and `labels`, or with the three ids of a pair."""
    return TokenRows()


def by_columns(row: Row) -> Formatter:
    """The formatter whose canonical columns the row has.

    Raises:
        DataError: ``unknown_format``.
    """
    answers = row.get("answers")
    if has(row, "input_ids") or has(row, "chosen_ids", "rejected_ids"):
        return tokens()
    if isinstance(row.get("segments"), list):
        return segments()
    if has(row, "chosen", "rejected"):
        return preference()
    if isinstance(answers, list) and len(answers) > 1 and is_comparison(row):
        return preference()
    return _of_one_answer(row)


def _of_one_answer(row: Row) -> Formatter:
    if isinstance(row.get("label"), bool) and has(row, "prompt", "completion"):
        raise DataError(
            "expected answers to learn, got judged ones, the bad among the good. Keep the good ones: "
            'records.filter(lambda row: row["label"]).remove_columns("label").',
            code="unknown_format",
            column="label",
        )
    if isinstance(row.get("messages"), list) or isinstance(row.get("prompt"), list):
        return chat()
    if isinstance(row.get("prompt"), str):
        return prompt_completion()
    if isinstance(row.get("text"), str):
        return text()
    raise DataError(
        "expected columns messages, prompt and completion, chosen and rejected, prompt and answers, or text, "
        f"found {sorted(row)}. Load the data with load_records, or pass a formatter.",
        code="unknown_format",
    )
