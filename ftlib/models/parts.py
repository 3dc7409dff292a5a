"""The parts of a model that the forward calls, and the path they take.

Shapes: C continuations, D hidden width, K scores of a continuation.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal, cast, final

import torch
from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftlib.adapters.encoder_head import is_encoder_classifier
from ftlib.adapters.task import score_head
from ftlib.batches import PackedBatch, Span
from ftlib.errors import CapabilityError
from ftlib.models.adapted import names_in
from ftlib.models.head import Head
from ftlib.models.virtual import VirtualTokens, virtual_tokens

__all__ = [
    "Path",
    "Plan",
    "Reader",
    "ScoreHead",
    "context_length",
    "context_words",
    "inner_model",
    "language_task",
    "make_plan",
    "require_decoder",
]

Path = Literal["grouped", "padded"]


@final
@dataclass(frozen=True, eq=False)
class ScoreHead:
    """The map from a continuation's last state to its scores.

    Args:
        module: one linear map [C, D] to [C, K], or peft's copy of it.
    """

    module: nn.Module

    @property
    def dtype(self) -> torch.dtype:
        """Of its weight, which may be wider than the body's."""
        return cast(Tensor, self.module.weight).dtype

    def scores(self, last_CD: Tensor) -> Tensor:
        """[C, K], at least float32, under autocast too."""
        with torch.autocast(last_CD.device.type, enabled=False):
            scores_CK: Tensor = self.module(last_CD.to(self.dtype))
        return scores_CK.to(torch.promote_types(scores_CK.dtype, torch.float32))


@final
@dataclass(frozen=True, eq=False)
class Reader:
    """The half of an encoder-decoder that reads prompts.

    Args:
        module: the encoder.
        start_id: what the decoder reads before the first token it writes.
    """

    module: PreTrainedModel
    start_id: int


@final
@dataclass(frozen=True, eq=False)
class Plan:
    """The parts of a model that the forward calls, and the path it takes.

    Args:
        body: the model without its head, of an encoder-decoder the decoder; gives hidden states.
        head: from hidden states to logits, or to scores.
        path: "grouped" or "padded".
        reason: why, in words for the log.
        takes_positions: whether the body accepts explicit positions.
        reader: of an encoder-decoder; else None.
        virtual: tokens that the active adapter puts before the text; else None.
    """

    body: PreTrainedModel
    head: Head | ScoreHead
    path: Path
    reason: str
    takes_positions: bool
    reader: Reader | None = None
    virtual: VirtualTokens | None = None

    def spans(self, batch: PackedBatch) -> tuple[Span, ...]:
        """Where the groups of a batch lie in a flat row of this model."""
        return batch.spans if self.virtual is None else self.virtual.spans(batch.spans)

    def require_grouped(self) -> None:
        """Raise `CapabilityError` if the flat row would be wrong for this model."""
        if self.path != "grouped":
            raise CapabilityError(
                f"grouped path: expected a model that can take a flat row, got {type(self.body).__name__}: "
                f"{self.reason}. Leave `path` alone; the padded path gives the same results."
            )

    def require_head(self, *, scores: bool) -> Head | ScoreHead:
        """The head, if it gives what is asked for; else `CapabilityError`."""
        if scores and isinstance(self.head, Head):
            raise CapabilityError(
                f"forward: expected a model with a score head for scores=True, got a language model on "
                f"{type(self.body).__name__}. Load one with ftlib.load(name, task='reward')."
            )
        if not scores and isinstance(self.head, ScoreHead):
            raise CapabilityError(
                f"forward: expected scores=True for a model with a score head, got scores=False for one on "
                f"{type(self.body).__name__}. Log-probabilities come from ftlib.load(name), scores from "
                "ftlib.load(name, task='reward')."
            )
        return self.head


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside, adapters and all.

    Raises:
        CapabilityError: neither a language model nor a classifier.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(inner, PreTrainedModel) or (
        inner.get_output_embeddings() is None
        and score_head(inner) is None
        and not is_encoder_classifier(inner)
    ):
        raise CapabilityError(
            f"models.forward: expected a causal language model of transformers, plain or with adapters, got "
            f"{type(inner).__name__}. Load one with ftlib.load(name)."
        )
    return inner


def language_task(model: nn.Module) -> Literal["causal_lm", "seq2seq_lm"]:
    """What `ftlib.load` calls the task of a language model, and `Encoder` the data for it."""
    return "seq2seq_lm" if inner_model(model).config.is_encoder_decoder else "causal_lm"


def context_length(model: nn.Module) -> int | None:
    """Most tokens of text in a row, virtual ones taken off; None where the config does not say."""
    text = inner_model(model).config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    return None if limit is None else int(limit) - _taken(model)


def context_words(model: nn.Module) -> str:
    """The model's context for an error message."""
    room, taken = context_length(model), _taken(model)
    whole = "any length" if room is None else f"{room + taken} tokens"
    return f"context of {whole}, {taken} of them virtual" if taken else f"context of {whole}"


def _taken(model: nn.Module) -> int:
    virtual = virtual_tokens(model)
    return 0 if virtual is None else virtual.count


def require_decoder(model: nn.Module, what: str) -> None:
    """Raise `CapabilityError` for an encoder-decoder, which `what` does not take."""
    inner = inner_model(model)
    if inner.config.is_encoder_decoder:
        raise CapabilityError(
            f"{what}: expected a decoder, got the encoder-decoder {type(inner).__name__}, which SFTTrainer "
            "and DPOTrainer take. Load a causal model: ftlib.load(name)."
        )


def make_plan(model: nn.Module, path: Path, reason: str) -> Plan:
    """The parts of a model, to run on one path.

    Raises:
        CapabilityError: not a language model, or one without a body of its own or a token to start from.
    """
    inner = inner_model(model)
    virtual = virtual_tokens(model)
    if inner.config.is_encoder_decoder:
        return Plan(inner.get_decoder(), _head(inner), path, reason, False, _reader(inner), virtual)
    if is_encoder_classifier(inner):
        raise CapabilityError(
            f"models.forward: expected a model that reads from left to right, got the encoder "
            f"{type(inner).__name__}, which scores whole rows: forward(model, batch, scores=True)."
        )
    body = inner.base_model
    if body is inner or not isinstance(body, PreTrainedModel):
        raise CapabilityError(
            f"models.forward: expected a model with a body under its head, got {type(inner).__name__} "
            "without one. Compute log-probabilities from its logits with ftlib.losses.token_logprobs."
        )
    takes_positions = "position_ids" in inspect.signature(body.forward).parameters
    return Plan(body, _head(inner), path, reason, takes_positions, virtual=virtual)


def _reader(inner: PreTrainedModel) -> Reader:
    start = getattr(inner.config, "decoder_start_token_id", None)
    if start is None:
        raise CapabilityError(
            f"models.forward: expected an encoder-decoder whose config names a decoder_start_token_id, got "
            f"{type(inner).__name__} without. Set model.config.decoder_start_token_id; T5 takes its pad id."
        )
    return Reader(inner.get_encoder(), int(start))


def _head(inner: PreTrainedModel) -> Head | ScoreHead:
    scores = score_head(inner)
    if scores is not None:
        return ScoreHead(scores)
    # of an encoder-decoder, `get_text_config` is a copy with other names
    own = inner.config
    text = own if own.is_encoder_decoder else own.get_text_config(decoder=True)
    multiplied, divided = getattr(text, "logit_scale", None), getattr(text, "logits_scaling", None)
    scale = float(multiplied or 1.0) / float(divided or 1.0)
    if getattr(text, "scale_decoder_outputs", False):  # T5 where head and embedding are one matrix
        scale *= float(text.hidden_size) ** -0.5
    output = inner.get_output_embeddings()
    if isinstance(output, AuxiliaryTrainingWrapper) and not _acts(output):
        output = output.original_module  # the base's own matrix, by the same path as without an adapter
    return Head(output, getattr(text, "final_logit_softcapping", None), scale)


def _acts(wrapper: Any) -> bool:
    """Whether an adapter's copy of a module, or rows of it, stand in for it now."""
    return not wrapper.disable_adapters and bool(names_in(wrapper, wrapper.active_adapters))
