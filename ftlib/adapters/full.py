"""Full fine-tuning: every weight is trained, nothing is added."""

from __future__ import annotations

from ftlib.adapters.adapter import Adapter
from ftlib.adapters.capability import FULL

__all__ = ["full"]


def full() -> Adapter:
    """Train all weights. bf16 weights keep float32 masters in the engine."""
    return Adapter("full", None, FULL)
