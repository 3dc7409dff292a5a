"""The steps since the last logged row, as sums and counts: a row is a mean, never a mean of means."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch

from ftlib.engine.engine import StepResult

__all__ = ["LogWindow", "peak_memory", "step_row"]


def step_row(result: StepResult) -> dict[str, float]:
    """Loss, terms where there are several, metrics, gradient norm and learning rate of one step."""
    window = LogWindow()
    window.add(result)
    return window.row()


@final
@dataclass
class LogWindow:
    """Sums over the steps since the last row. Plain numbers, so a checkpoint can hold it."""

    sums: dict[str, list[float]] = field(default_factory=dict)  # "terms/nll" -> [sum, count]
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, result: StepResult) -> None:
        """Count one step. A skipped step adds its gradient norm, which is shown as it was."""
        for kind, means in (("terms", result.terms), ("metrics", result.metrics)):
            for name, mean in means.items():
                pair = self.sums.setdefault(f"{kind}/{name}", [0.0, 0.0])
                pair[0] += float(mean.sum)
                pair[1] += float(mean.count)
        self.grad_norm = result.grad_norm
        self.learning_rate = result.learning_rate
        self.tokens += result.tokens

    def row(self) -> dict[str, float]:
        """Means over the window; gradient norm and learning rate of its last step."""
        means = {name: total / count if count else math.nan for name, (total, count) in self.sums.items()}
        terms = {
            name.removeprefix("terms/"): mean for name, mean in means.items() if name.startswith("terms/")
        }
        row = {"loss": sum(terms.values())}
        if len(terms) > 1:
            row |= {f"loss_{name}": mean for name, mean in terms.items()}
        row |= {
            name.removeprefix("metrics/"): mean for name, mean in means.items() if name.startswith("metrics/")
        }
        return row | {"grad_norm": self.grad_norm, "learning_rate": self.learning_rate}

    def speed(self) -> float:
        """Real tokens per second since the window began."""
        return self.tokens / max(time.perf_counter() - self.started, 1e-9)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "sums": self.sums,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "tokens": self.tokens,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> LogWindow:
        """From `state`; the clock starts now."""
        return cls(**state)


def peak_memory(device: torch.device) -> int:
    """Most bytes used so far: of the device's allocator on CUDA, else resident memory of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
