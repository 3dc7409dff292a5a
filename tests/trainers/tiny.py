"""A tiny trainer and rows for it: encoded examples of uneven lengths with fractional loss weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ftlib.adapters import Adapter, full, lora
from ftlib.engine import TrainConfig
from ftlib.models.sharding import distributed_like
from ftlib.trainers import SFTTrainer
from tests.models_zoo import VOCAB, tiny_model

__all__ = ["At", "one_thread", "rows", "sft", "trained", "without_clock"]

NOT_TEXT = 3  # ids below are special
CLOCK = (
    "tokens_per_second",
    "rollout_tokens_per_second",
    "update_tokens_per_second",
    "peak_memory_bytes",
    "seconds",
)
ADAPTERS = {"full": full, "lora": lambda: lora(4), "lora dropout": lambda: lora(4, dropout=0.2)}


def rows(count: int, *, seed: int = 0, weighted: bool = True) -> list[dict[str, Any]]:
    """Prompts of 2 to 8 tokens, completions of 3 to 12, weights of the latter in (0.1, 2.1) or all 1."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        prefix, length = 2 + 3 * index % 7, 3 + 7 * index % 10
        ids = torch.randint(NOT_TEXT, VOCAB, (prefix + length,), generator=generator).tolist()
        weights = (0.1 + 2 * torch.rand(length, generator=generator)).tolist() if weighted else [1.0] * length
        made.append(
            {
                "prefix_ids": ids[:prefix],
                "prefix_weights": [0.0] * prefix,
                "continuation_ids": [ids[prefix:]],
                "continuation_weights": [weights],
                "length": prefix + length,
                "source": f"rows:{index}",
            }
        )
    return made


def sft(
    *,
    adapter: str | Adapter = "lora",
    data: Any = None,
    eval_data: Any = None,
    model: nn.Module | None = None,
    callbacks: Any = (),
    objective: Any = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> SFTTrainer:
    """A trainer of a tiny Llama, the same at every call; `options` are those of `TrainConfig`.

    LoRA's second factor is drawn too: with the usual zeros the first one would have no gradient.
    """
    torch.manual_seed(0)  # of the adapter's initialisation
    config = TrainConfig(
        **{"progress": "off", "learning_rate": 1e-3, "batch_size": 4, "log_steps": 1} | options
    )
    trainer = SFTTrainer(
        (tiny_model("llama") if model is None else model).to(dtype),
        rows(10) if data is None else data,
        eval_data,
        adapter=ADAPTERS[adapter]() if isinstance(adapter, str) else adapter,
        config=config,
        callbacks=callbacks,
        objective=objective,
    )
    if model is None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in trainer.engine.masters.named.items():
                if "lora_B" in name:
                    drawn = 0.1 * torch.randn(weight.shape, generator=generator)
                    weight.copy_(distributed_like(drawn, weight))
    return trainer


def trained(trainer: SFTTrainer) -> dict[str, Tensor]:
    """Copies of the trained weights and their masters, by name."""
    masters = trainer.engine.masters
    weights = {f"weight {name}": weight.detach().clone() for name, weight in masters.weights.items()}
    return weights | {f"master {name}": value for name, value in masters.copies().items()}


def without_clock(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Logged rows less what the clock and the allocator decide."""
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in history]


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny matrices on one thread: two spend their time waiting for each other, seconds on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class At(TrainerCallback):
    """Calls `function(control)` when `event` happens at `step`."""

    def __init__(self, event: str, step: int, function: Any) -> None:
        def method(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                function(control)

        setattr(self, event, method)
