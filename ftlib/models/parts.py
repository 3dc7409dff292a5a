"""The parts of a causal language model that the forward calls, and the path they take."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Literal, final

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ftlib.errors import CapabilityError
from ftlib.models.head import Head

__all__ = ["Path", "Plan", "inner_model", "make_plan"]

Path = Literal["grouped", "padded"]


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """The parts of a model that the forward calls, and the path it takes.

    Args:
        body: the model without its head; gives hidden states.
        head: from hidden states to logits.
        path: "grouped" or "padded".
        reason: why, in words for the log.
        takes_positions: whether the body accepts explicit positions.
    """

    body: PreTrainedModel
    head: Head
    path: Path
    reason: str
    takes_positions: bool

    def require_grouped(self) -> None:
        """Raise `CapabilityError` if the flat row would be wrong for this model."""
        if self.path != "grouped":
            raise CapabilityError(
                f"grouped path: expected a model that can take a flat row, got {type(self.body).__name__}: "
                f"{self.reason}. Leave `path` alone; the padded path gives the same results."
            )


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside, adapters and all.

    Raises:
        CapabilityError: not a causal language model.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise CapabilityError(
            f"models.forward: expected a causal language model of transformers, plain or with adapters, got "
            f"{type(inner).__name__}. Load one with ftlib.load(name)."
        )
    if inner.config.is_encoder_decoder:
        raise CapabilityError(
            f"models.forward: expected a decoder, got the encoder-decoder {type(inner).__name__}. "
            "Load a causal model: ftlib.load(name, task='causal_lm')."
        )
    return inner


def make_plan(model: nn.Module, path: Path, reason: str) -> Plan:
    """The parts of a model, to run on one path.

    Raises:
        CapabilityError: not a causal language model, or one without a body of its own.
    """
    inner = inner_model(model)
    text = inner.config.get_text_config(decoder=True)
    multiplied, divided = getattr(text, "logit_scale", None), getattr(text, "logits_scaling", None)
    scale = float(multiplied or 1.0) / float(divided or 1.0)
    head = Head(inner.get_output_embeddings(), getattr(text, "final_logit_softcapping", None), scale)
    body = inner.base_model
    if body is inner or not isinstance(body, PreTrainedModel):
        raise CapabilityError(
            f"models.forward: expected a model with a body under its head, got {type(inner).__name__} "
            "without one. Compute log-probabilities from its logits with ftlib.losses.token_logprobs."
        )
    return Plan(body, head, path, reason, "position_ids" in inspect.signature(body.forward).parameters)
