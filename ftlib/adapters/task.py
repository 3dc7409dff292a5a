"""What a model is for, as an adapter needs to know it.

A score head belongs to the task: it is new, so it is trained and saved whatever the adapter. peft does
both for every configuration whose task is SEQ_CLS.
"""

from __future__ import annotations

from peft import PeftConfig, PeftModel, TaskType
from torch import nn
from transformers import PreTrainedModel

from ftlib.adapters.encoder_head import is_encoder_classifier, train_head
from ftlib.errors import CapabilityError

__all__ = ["SCORE", "fit_task", "score_head"]

SCORE = "score"  # how the decoders of transformers' sequence classification name their head


def score_head(model: nn.Module) -> nn.Module | None:
    """The head of a model that scores whole sequences, as the adapter has it; None of any other model."""
    inner = _inner(model)
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is not None:
        return None
    head = getattr(inner, SCORE, None)
    return head if isinstance(head, nn.Module) else None


def fit_task(config: PeftConfig, model: nn.Module) -> None:
    """Give a configuration the task of a model with a head, or of an encoder-decoder, whatever it says.

    Raises:
        CapabilityError: a configuration that trains a head, for a language model.
    """
    if score_head(model) is not None or is_encoder_classifier(model):
        config.task_type = TaskType.SEQ_CLS
        train_head(config, model)
        return
    inner = _inner(model)
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        return
    if config.task_type == TaskType.SEQ_CLS:
        raise CapabilityError(
            f"attach: expected a model with a head for an adapter of task SEQ_CLS, got the language model "
            f"{type(inner).__name__}. Load it with ftlib.load(name, task='reward') or task='classification'."
        )
    if inner.config.is_encoder_decoder:
        config.task_type = TaskType.SEQ_2_SEQ_LM
    elif config.is_prompt_learning:  # without a task, peft forgets virtual tokens; masked models have none
        config.task_type = TaskType.CAUSAL_LM if inner.can_generate() else TaskType.FEATURE_EXTRACTION
    elif config.task_type == TaskType.CAUSAL_LM and not inner.can_generate():
        config.task_type = None  # peft has no task for masked language models, and asks others to generate


def _inner(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model
