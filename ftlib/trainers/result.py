"""What a finished run leaves in the caller's hands."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any, final

from ftlib.engine.engine import Engine
from ftlib.engine.window import peak_memory
from ftlib.trainers.snapshot import Boundary, Counters

__all__ = ["TrainResult", "result_of"]


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


def result_of(boundary: Boundary, before: Counters, engine: Engine, stopped_by: str | None) -> TrainResult:
    """The result of a run.

    Args:
        boundary: where it ended.
        before: what had been done when it began; the speed is of this run alone.
        engine: that made its steps.
        stopped_by: see `TrainResult`.
    """
    counters, best = boundary.counters, boundary.best
    losses = [row["loss"] for row in boundary.history if "loss" in row]
    metrics = {
        "loss": losses[-1] if losses else math.nan,
        "steps": counters.step,
        **{name: value for name, value in asdict(counters).items() if name != "step"},
        "skipped_steps": engine.skipped,
        "tokens_per_second": (counters.tokens - before.tokens) / max(counters.seconds - before.seconds, 1e-9),
        "peak_memory_bytes": peak_memory(engine.device),
    }
    if best["step"] is not None:
        metrics |= {"best_metric": best["metric"], "best_step": best["step"]}
    return TrainResult(list(boundary.history), metrics, stopped_by)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
