"""What a trainer tells its model card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ftlib.engine.config import TrainConfig
from ftlib.export import CardData
from ftlib.trainers.fingerprint import data_fingerprint, streams

__all__ = ["card_data"]

SAMPLES = 3


def card_data(
    kind: str,
    config: TrainConfig,
    learning_rate: float,
    data: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase | None,
    history: Sequence[Mapping[str, Any]],
    *,
    samples: bool = True,
) -> CardData:
    """Data, settings and the last figures of a run; base and adapter are read from the model itself."""
    shown = [data[index] for index in range(min(SAMPLES, len(data)))] if samples and tokenizer else []
    template = getattr(tokenizer, "chat_template", None)
    return CardData(
        title=config.run_name or f"{kind} model",
        trainer=kind,
        data_rows=len(data),
        data_fingerprint=data_fingerprint(data)[:16],
        samples=tuple(str(tokenizer.decode(_ids(example))) for example in shown if tokenizer is not None),
        show_samples=samples,
        trained_share=_trained_share(data),
        template_hash=hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None,
        hyperparameters={**config.identity(), "learning_rate": learning_rate},
        metrics=_last_figures(history),
    )


def _last_figures(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for row in history:
        figures |= {name: value for name, value in row.items() if name == "loss" or name.startswith("eval_")}
    return figures


def _trained_share(data: Sequence[Mapping[str, Any]]) -> float:
    trained = tokens = 0
    for some in streams(data):
        for name in ("prefix_weights", "continuation_weights"):
            weights = some[name][-1]
            trained, tokens = trained + int((weights > 0).sum()), tokens + len(weights)
    return trained / max(1, tokens)


def _ids(example: Mapping[str, Any]) -> list[int]:
    return [*example["prefix_ids"], *(token for ids in example["continuation_ids"] for token in ids)]
