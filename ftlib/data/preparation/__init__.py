"""Checks and fixes for training data: `prepare`, and the table of its checks."""

from __future__ import annotations

from ftlib.data.preparation.checks import CHECKS
from ftlib.data.preparation.prepare import prepare
from ftlib.data.preparation.prepared import Prepared

__all__ = ["CHECKS", "Prepared", "prepare"]
