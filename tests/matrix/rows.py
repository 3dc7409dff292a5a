"""The rows of the matrix: one record per adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ftlib.adapters import Adapter, full, ia3, lora, p_tuning, prefix, prompt, stack
from ftlib.models.quantise import Quantisation

__all__ = ["ROWS", "Row"]

N = 5  # virtual tokens


@dataclass(frozen=True)
class Row:
    """An adapter as the matrix tries it.

    Args:
        name: its heading.
        adapter: makes it; given the column's examples where `on_data`.
        rate: peak learning rate for rows that are to be learned by heart.
        left: share of the loss that 60 steps on eight rows may leave.
        held: how the base is quantised.
        on_data: its initialisation sees examples.
        short: tried in short runs of the suite too; the others stand there in tests of one trainer.
    """

    name: str
    adapter: Callable[..., Adapter]
    rate: float = 1e-2
    left: float = 0.05
    held: Quantisation | None = None
    on_data: bool = False
    short: bool = False

    def make(self, examples: Any) -> Adapter:
        """The adapter for a column with these examples."""
        return self.adapter(data=examples) if self.on_data else self.adapter()


VIRTUAL: dict[str, Any] = {"rate": 5e-2, "left": 0.5}
ENCODED: dict[str, Any] = {"rate": 5e-3, "left": 0.5}
ROWS = (
    Row("full", full, rate=3e-3),
    Row("LoRA", partial(lora, 4), short=True),
    Row("rsLoRA", partial(lora, 4, rslora=True)),
    Row("DoRA", partial(lora, 4, dora=True)),
    Row("EVA", partial(lora, 4, init="eva"), on_data=True),
    Row("PiSSA", partial(lora, 4, init="pissa")),
    Row("OLoRA", partial(lora, 4, init="olora")),
    Row("QLoRA nf4", partial(lora, 4), held="nf4"),
    Row("QLoRA int8", partial(lora, 4), held="int8"),
    Row("IA3", ia3, rate=5e-2, left=0.25),
    Row("prompt", partial(prompt, N), short=True, **VIRTUAL),
    Row("P-tuning MLP", partial(p_tuning, N, encoder="mlp"), **ENCODED),
    Row("P-tuning LSTM", partial(p_tuning, N, encoder="lstm"), **ENCODED),
    Row("prefix", partial(prefix, N), **VIRTUAL),
    Row("prefix MLP", partial(prefix, N, projection=True), **ENCODED),
    Row("prompt + LoRA", lambda: stack(prompt(N), lora(4)), short=True),
    Row("prefix + IA3", lambda: stack(prefix(N), ia3()), rate=5e-2, left=0.25),
)
