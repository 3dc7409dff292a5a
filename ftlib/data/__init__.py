"""Records, transforms of them, formatters, the encoder, the sampler and the collator."""

from __future__ import annotations

from ftlib.data import cloze, formatters, instructions, transforms
from ftlib.data.collate import collate
from ftlib.data.encode import Encoder
from ftlib.data.few_shot import few_shot_split
from ftlib.data.labelled import LabelledEncoder
from ftlib.data.labels import Labels
from ftlib.data.preparation import Prepared, prepare
from ftlib.data.records import LoadReport, load_records, load_report
from ftlib.data.sampler import StepSampler, balance, pack
from ftlib.data.segments import Answers, Conversation, Formatter, Segment, Segments, Skipped, Tokens
from ftlib.data.to_trl import to_trl
from ftlib.data.transforms import decontaminate, deduplicate, mix, split

__all__ = [
    "Answers",
    "Conversation",
    "Encoder",
    "Formatter",
    "LabelledEncoder",
    "Labels",
    "LoadReport",
    "Prepared",
    "Segment",
    "Segments",
    "Skipped",
    "StepSampler",
    "Tokens",
    "balance",
    "cloze",
    "collate",
    "decontaminate",
    "deduplicate",
    "few_shot_split",
    "formatters",
    "instructions",
    "load_records",
    "load_report",
    "mix",
    "pack",
    "prepare",
    "split",
    "to_trl",
    "transforms",
]
