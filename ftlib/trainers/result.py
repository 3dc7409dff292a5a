"""What a finished run leaves in the caller's hands."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import Any, final

__all__ = ["TrainResult"]


@final
@dataclass(frozen=True)
class TrainResult:
    """History and final numbers of a run.

    Args:
        history: one dict per logged step, ``{"step", "loss", "learning_rate", "grad_norm", "tokens", ...}``;
            rows of evaluations carry ``"eval_..."``. `pandas.DataFrame(history)` works as it is.
        metrics: ``tokens_per_second``, ``peak_memory_bytes``, ``steps``, ``seconds``, ``loss``, ...
        stopped_by: what ended the run early, e.g. "SIGTERM"; None when it ran to its end.
    """

    history: list[dict[str, Any]] = field(repr=False)
    metrics: dict[str, Any]
    stopped_by: str | None = None

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th><td>{escape(_text(value))}</td></tr>"
            for name, value in {**self.metrics, "stopped by": self.stopped_by or "its end"}.items()
        )
        return f"<table>{cells}</table>"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
