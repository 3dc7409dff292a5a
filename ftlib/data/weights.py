"""What is trained: one float weight per segment, from a preset or the user's function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

from ftlib.checks import check as check_options
from ftlib.checks import number
from ftlib.data.segments import OUTPUT, Conversation, Segment, Segments, TrainOn
from ftlib.errors import ConfigError, DataError

__all__ = ["check", "segment_weights", "trained_turns"]

PRESETS: tuple[str, ...] = get_args(get_args(TrainOn)[0])


def check(train_on: TrainOn, prompt_loss_weight: float) -> None:
    """Refuse options that are unknown, out of range or without effect.

    Raises:
        ConfigError: as said.
    """
    if not callable(train_on) and train_on not in PRESETS:
        raise ConfigError(
            f"Encoder: expected train_on as one of {list(PRESETS)} or a function, got {train_on!r}."
        )
    check_options("Encoder", {"prompt_loss_weight": (prompt_loss_weight, number(0))})
    if prompt_loss_weight and (callable(train_on) or train_on == "all"):
        raise ConfigError(
            f"Encoder: prompt_loss_weight={prompt_loss_weight} has no effect here, because train_on already "
            "weights the prompt. Leave one of the two out."
        )


def trained_turns(conversation: Conversation, train_on: TrainOn) -> list[int]:
    """Indices of the assistant turns that are trained."""
    messages = conversation.messages
    turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "completion":
        turns = [k for k in turns if k >= conversation.given]
    elif train_on == "last":
        turns = [k for k in turns[-1:] if k == len(messages) - 1]
    return [k for k in turns if messages[k].get("weight", 1.0) != 0]


def segment_weights(segments: Segments, train_on: TrainOn, prompt_loss_weight: float) -> tuple[float, ...]:
    """The loss weight of each part of `segments`, finite and >= 0.

    Explicit weights multiply every preset; under ``"weighted"`` they also train what the preset
    leaves alone.

    Raises:
        DataError: a function that returns another number of weights, or a weight out of range.
    """
    if callable(train_on):
        weights = _checked(train_on(segments), len(segments.parts))
    else:
        weights = tuple(_preset(part, train_on, prompt_loss_weight) for part in segments.parts)
    return weights


def _preset(part: Segment, train_on: Any, prompt_loss_weight: float) -> float:
    explicit = 1.0 if part.weight is None else part.weight
    if train_on == "all":
        return explicit
    if part.role in OUTPUT:
        # Plain text has no turns, so a preset that asks for turns trains nothing of it.
        return 0.0 if part.role == "text" and train_on in ("assistant", "last") else explicit
    if train_on == "weighted" and part.weight is not None:
        return part.weight
    return prompt_loss_weight * explicit if part.role == "prompt" else 0.0


def _checked(returned: Sequence[Any], parts: int) -> tuple[float, ...]:
    weights = tuple(float(weight) for weight in returned)
    if len(weights) != parts or not all(0.0 <= weight < math.inf for weight in weights):
        raise DataError(
            f"train_on: expected {parts} finite weights >= 0, one per segment, got {list(weights)!r:.80}.",
            code="bad_weights",
        )
    return weights
