"""Tiny preference trainers: encoded pairs of uneven lengths, and short runs that can be stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ftlib.adapters import attach
from ftlib.engine import TrainConfig
from ftlib.trainers import DPOTrainer, RewardTrainer
from tests.models_zoo import EOS, VOCAB, tiny_model
from tests.trainers.runs import Run
from tests.trainers.tiny import ADAPTERS, NOT_TEXT, trained

__all__ = ["PAIRS", "UNSEEN", "moved", "pairs", "preference_run", "preference_trainer"]

Kind = type[DPOTrainer] | type[RewardTrainer]


def pairs(count: int, *, seed: int = 0, prefix: int | None = None, answers: int = 2) -> list[dict[str, Any]]:
    """Prompts of 2 to 8 tokens, or of `prefix`, and answers of 3 to 12, which end in EOS."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        found: list[int] = torch.randint(NOT_TEXT, VOCAB, (length,), generator=generator).tolist()
        return found

    made = []
    for index in range(count):
        prompt = ids(2 + 3 * index % 7 if prefix is None else prefix)
        sides = [[*ids(2 + (7 * index + 3 * side) % 10), EOS] for side in range(answers)]
        made.append(
            {
                "prefix_ids": prompt,
                "prefix_weights": [0.0] * len(prompt),
                "continuation_ids": sides,
                "continuation_weights": [[1.0] * len(side) for side in sides],
                "length": len(prompt) + sum(map(len, sides)),
                "source": f"pairs:{index + 1}",
            }
        )
    return made


PAIRS, UNSEEN = pairs(10), pairs(3, seed=1)


@torch.no_grad()
def moved(model: Any, *, seed: int = 1, by: float = 0.05) -> Any:
    """The model after what stands for training: every trained weight moved."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.add_(by * torch.randn(weight.shape, generator=generator))
    return model


def preference_trainer(
    kind: Kind,
    *,
    adapter: Any = "lora",
    model: nn.Module | None = None,
    data: Any = None,
    eval_data: Any = None,
    seed_of_weights: int = 0,
    **options: Any,
) -> Any:
    """A trainer of a tiny Llama, the same at every call.

    Args:
        kind: `DPOTrainer` or `RewardTrainer`.
        adapter: a name of `tiny.ADAPTERS`, an adapter, or None.
        model: in place of the Llama.
        data: in place of `PAIRS`.
        eval_data: for evaluations.
        seed_of_weights: of the global generator, which draws adapters and score heads.
        options: of `TrainConfig`, the rest of the trainer.
    """
    torch.manual_seed(seed_of_weights)
    own = {name: options.pop(name) for name in list(options) if name not in TrainConfig.__dataclass_fields__}
    defaults = {"progress": "off", "learning_rate": 1e-3, "batch_size": 4, "log_steps": 1}
    return kind(
        tiny_model("llama") if model is None else model,
        PAIRS if data is None else data,
        eval_data,
        adapter=ADAPTERS[adapter]() if isinstance(adapter, str) else adapter,
        config=TrainConfig(**(defaults | options)),
        **own,
    )


def preference_run(
    kind: Kind, folder: Path | None, *, adapter: str = "lora", resume: Any = None, **options: Any
) -> Run:
    """Train two epochs of 4 + 4 + 2 pairs, or go on with them. An adapter has learnt something before.

    So DPO's reference is a snapshot of it.
    """
    torch.manual_seed(0)
    model = options.pop("model", None) or moved(attach(tiny_model("llama"), ADAPTERS[adapter]()))
    defaults = {"epochs": 2, "warmup": 2, "eval_steps": 3, "eval_data": UNSEEN, "max_tokens": 60}
    trainer = preference_trainer(kind, adapter=None, model=model, output_dir=folder, **(defaults | options))
    result = trainer.train(resume=resume)
    return Run(trainer, trained(trainer), result)
