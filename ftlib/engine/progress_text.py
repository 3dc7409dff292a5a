"""Metrics as short text: names with their units, numbers with the digits that matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["duration", "metric_name", "metric_text", "metrics_text"]

_BYTES = "_bytes"
_PER_SECOND = "_per_second"


def metrics_text(row: Mapping[str, Any]) -> str:
    """One log entry on one line, the step left out.

    Example:
        >>> metrics_text({"loss": 2.345678, "tokens_per_second": 1234.5, "peak_memory_bytes": 2**30})
        'loss 2.346  tokens/s 1,234  peak_memory 1.0 GiB'
    """
    return "  ".join(
        f"{metric_name(name)} {metric_text(name, value)}" for name, value in row.items() if name != "step"
    )


def metric_name(name: str) -> str:
    """A metric's name as shown: ``tokens_per_second`` is ``tokens/s``; bytes carry their unit themselves."""
    return printable(name.removesuffix(_BYTES).replace(_PER_SECOND, "/s"))


def metric_text(name: str, value: Any) -> str:
    """A metric's value as shown. Anything that is not a number is shown as printable text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return printable(str(value))
    if name.endswith(_BYTES):
        return _binary_size(value)
    if isinstance(value, int):
        return f"{value:,}"
    if name.endswith(_PER_SECOND) and abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2e}" if "learning_rate" in name else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    Example:
        >>> duration(59.6), duration(3661)
        ('1:00', '1:01:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def printable(text: str) -> str:
    """Text that cannot move a cursor or break a line: control characters are shown escaped."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _binary_size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
