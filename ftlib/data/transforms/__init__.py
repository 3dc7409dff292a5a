"""Records to records: each transform leaves its input alone and reports what it did, in counts."""

from __future__ import annotations

from ftlib.data.transforms.decontaminate import decontaminate
from ftlib.data.transforms.deduplicate import deduplicate
from ftlib.data.transforms.filter import filter  # noqa: A004  the name users know
from ftlib.data.transforms.mix import mix
from ftlib.data.transforms.near import near_duplicates
from ftlib.data.transforms.normalise import normalise
from ftlib.data.transforms.pipeline import pipeline
from ftlib.data.transforms.report import Step, Transformed, TransformReport
from ftlib.data.transforms.split import split
from ftlib.data.transforms.template import template

__all__ = [
    "Step",
    "TransformReport",
    "Transformed",
    "decontaminate",
    "deduplicate",
    "filter",
    "mix",
    "near_duplicates",
    "normalise",
    "pipeline",
    "split",
    "template",
]
