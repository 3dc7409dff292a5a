"""The record formats: a table of rules, tried in order, and those that are read only when named."""

from __future__ import annotations

from ftlib.data.formats.chats import MESSAGES, QUESTIONS
from ftlib.data.formats.classes import CHOICES, LABELLED, LABELLED_PAIR
from ftlib.data.formats.comparisons import (
    ARGILLA,
    DIALOGUES,
    JUDGED,
    OPENAI,
    PREFERENCE,
    RANKED,
    REJECTED_ANSWER,
    STACK_EXCHANGE,
    TURNS,
)
from ftlib.data.formats.completions import FLAN, INPUT_OUTPUT, PROMPT_COMPLETION, TASKS
from ftlib.data.formats.instructions import INSTRUCTION, QUESTION
from ftlib.data.formats.judgements import KTO, KTO_MESSAGES, STEPS
from ftlib.data.formats.plain import CONTENT, PROMPT, RAW_CONTENT, TEXT
from ftlib.data.formats.rule import Converted, Dropped, FormatOptions, Gathered, Outputs, Rule
from ftlib.data.formats.spans import SEGMENTS, WEIGHTED_TEXT
from ftlib.data.formats.tokenised import MASKED_TOKENS, TOKENISED, TOKENISED_PAIR
from ftlib.data.formats.trees import TREES
from ftlib.errors import ConfigError

__all__ = [
    "BY_NAME",
    "RULES",
    "Converted",
    "Dropped",
    "FormatOptions",
    "Gathered",
    "Outputs",
    "Rule",
    "rule_named",
]

RULES: tuple[Rule, ...] = (
    TOKENISED,
    TOKENISED_PAIR,
    SEGMENTS,
    WEIGHTED_TEXT,
    OPENAI,
    PREFERENCE,
    TURNS,
    DIALOGUES,
    REJECTED_ANSWER,
    ARGILLA,
    STACK_EXCHANGE,
    JUDGED,
    RANKED,
    STEPS,
    KTO,
    KTO_MESSAGES,
    QUESTIONS,
    MESSAGES,
    INSTRUCTION,
    PROMPT_COMPLETION,
    FLAN,
    CHOICES,
    QUESTION,
    INPUT_OUTPUT,
    TASKS,
    LABELLED,
    LABELLED_PAIR,
    PROMPT,
    TEXT,
)
BY_NAME: tuple[Rule, ...] = (TREES, MASKED_TOKENS, CONTENT, RAW_CONTENT)


def rule_named(name: str) -> Rule:
    """The rule that `format=` names.

    Raises:
        ConfigError: no such rule.
    """
    for rule in (*RULES, *BY_NAME):
        if rule.name == name:
            return rule
    names = ["auto", "rows", *(rule.name for rule in (*RULES, *BY_NAME))]
    raise ConfigError(f"load_records: expected format as one of {names}, got {name!r}.")
