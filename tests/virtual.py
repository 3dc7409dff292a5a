"""Soft prompts on tiny models, and what peft itself computes with them, one unpadded row at a time.

Shapes: T tokens, N scored rows, C continuations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel

from ftlib.adapters import Adapter, attach, p_tuning, prefix, prompt
from ftlib.batches import Group
from tests.models_zoo import tiny_model
from tests.packed import OwnLogits

__all__ = ["COUNT", "SOFT", "own_logprobs", "soft_model"]

COUNT = 5
SOFT: dict[str, Callable[[], Adapter]] = {
    "prompt": lambda: prompt(COUNT),
    "p-tuning lstm": lambda: p_tuning(COUNT),
    "p-tuning mlp": lambda: p_tuning(COUNT, encoder="mlp"),
    "prefix": lambda: prefix(COUNT),
    "prefix projection": lambda: prefix(COUNT, projection=True),
}


def soft_model(kind: str, arch: str = "llama", *, name: str = "default", **changes: Any) -> PeftModel:
    """A tiny model with an adapter of `SOFT`, the same at every call."""
    torch.manual_seed(0)
    model = attach(tiny_model(arch, **changes), SOFT[kind](), name=name)
    assert isinstance(model, PeftModel)
    return model.eval()


def own_logprobs(model: PeftModel, groups: Sequence[Group]) -> OwnLogits:
    """As `tests.packed.own_logprobs`, by peft's forward, less the first rows, of virtual tokens."""
    logprobs, last = [], []
    for group in groups:
        for ids in group.continuation_ids:
            row_1L = torch.cat([group.prefix_ids, ids])[None]
            output = model(input_ids=row_1L, output_hidden_states=True)
            logprobs_LV = output.logits[0, -row_1L.shape[1] :].log_softmax(-1)
            first = max(len(group.prefix_ids), 1)
            rows = torch.arange(first - 1, row_1L.shape[1] - 1)
            logprobs.append(logprobs_LV[rows, row_1L[0, first:]])
            last.append(output.hidden_states[-1][0, -1])
    return OwnLogits(torch.cat(logprobs), torch.stack(last))
