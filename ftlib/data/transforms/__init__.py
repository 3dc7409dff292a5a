"""Records to records: each transform leaves its input alone and reports what it did, in counts."""

from __future__ import annotations

from ftlib.data.transforms.near import near_duplicates
from ftlib.data.transforms.normalise import normalise
from ftlib.data.transforms.report import Step, Transformed, TransformReport
from ftlib.data.transforms.split import split

__all__ = ["Step", "TransformReport", "Transformed", "near_duplicates", "normalise", "split"]
