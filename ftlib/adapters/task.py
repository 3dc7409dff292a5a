"""What a model is for, as an adapter needs to know it.

A score head belongs to the task: it is new, so it is trained and saved whatever the adapter.
"""

from __future__ import annotations

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

__all__ = ["SCORE", "score_head"]

SCORE = "score"  # how the decoders of transformers' sequence classification name their head


def score_head(model: nn.Module) -> nn.Module | None:
    """The head of a model that scores whole sequences, as the adapter has it; None of any other model."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is not None:
        return None
    head = getattr(inner, SCORE, None)
    return head if isinstance(head, nn.Module) else None
