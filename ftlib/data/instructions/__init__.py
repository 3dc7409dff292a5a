"""Instruction templates: published layouts of instruction data, and collections of them."""

from __future__ import annotations

from ftlib.data.instructions.alpaca import alpaca, dolly
from ftlib.data.instructions.layout import Instructed, Instruction, Kind
from ftlib.data.instructions.natural import instances, super_natural_instructions
from ftlib.data.instructions.p3 import p3
from ftlib.data.instructions.promptsource import promptsource
from ftlib.data.instructions.worded import Shots, flan, worded

__all__ = [
    "Instructed",
    "Instruction",
    "Kind",
    "Shots",
    "alpaca",
    "dolly",
    "flan",
    "instances",
    "p3",
    "promptsource",
    "super_natural_instructions",
    "worded",
]
