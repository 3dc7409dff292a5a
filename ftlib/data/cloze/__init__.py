"""Cloze questions: templates with a gap, verbalizers, and their check against a tokenizer."""

from __future__ import annotations

from ftlib.data.cloze.check import check_words, word_ids
from ftlib.data.cloze.formatter import Cloze, soft_tokens
from ftlib.data.cloze.verbalizers import Generation, Manual, MultiWord, Soft, Verbalizer

__all__ = [
    "Cloze",
    "Generation",
    "Manual",
    "MultiWord",
    "Soft",
    "Verbalizer",
    "check_words",
    "soft_tokens",
    "word_ids",
]
