"""The quick start that `make demo` runs: text that ships with Python, and the report it writes."""

from __future__ import annotations

from ftlib.demo.corpora import docstring_pairs, split_pairs, topic_records
from ftlib.demo.report import Report

__all__ = ["Report", "docstring_pairs", "split_pairs", "topic_records"]
