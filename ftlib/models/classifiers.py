"""A model that classifies: an encoder's own class for it, or a language model's body under a score head.

Both are what transformers has for sequence classification, so saving, adapters and plain loading are
transformers' and peft's own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from ftlib.adapters.classes import Classes, classes_of, read_classes, set_classes
from ftlib.adapters.encoder_head import encoder_head, is_encoder_classifier
from ftlib.adapters.task import score_head
from ftlib.errors import CapabilityError, CheckpointError, ConfigError
from ftlib.models.heads import with_score_head
from ftlib.models.parts import inner_model

__all__ = ["as_classifier", "check_head_alone_is_new", "count_labels", "is_encoder", "named"]

logger = logging.getLogger(__name__)
AnyModel = PreTrainedModel | PeftModel


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether the architecture classifies by a head of its own, instead of one on a row's last state."""
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return False
    with torch.device("meta"):
        made = cast(Any, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)])(config)
    return is_encoder_classifier(made)


def count_labels(num_labels: int | None, adapter: Any, config: PretrainedConfig | None) -> int:
    """How many classes a model to be loaded has: as asked for, as its adapter was saved, as its own head.

    Args:
        num_labels: the caller's.
        adapter: the caller's; a folder may tell.
        config: of a classifier's checkpoint; None of any other.

    Raises:
        ConfigError: nothing says it, or too few.
    """
    saved = read_classes(Path(adapter)) if isinstance(adapter, str | Path) else None
    count = num_labels
    if count is None and saved is not None:
        count = len(saved.names)
    if count is None and config is not None:
        count = config.num_labels
    if count is None or count < 1:
        raise ConfigError(
            f"load: expected num_labels, the number of classes, with task='classification', got {count}. "
            'Give it: load(name, task="classification", num_labels=3).'
        )
    return count


def as_classifier(
    model: AnyModel, classes: Classes | int, tokenizer: PreTrainedTokenizerBase | None = None
) -> AnyModel:
    """A model with one score per class.

    Args:
        model: a plain language model, whose body is shared, not copied, and gets a score head; or a
            classifier with that many classes, which is returned as it is, but for their names.
        classes: the classes, or how many there are.
        tokenizer: to choose the pad id of a language model from, for plain transformers.

    Raises:
        CapabilityError: a language model with adapters, or one without a class for this in transformers.
        ConfigError: a classifier with another number of classes.
    """
    inner, count = inner_model(model), classes if isinstance(classes, int) else len(classes.names)
    if score_head(inner) is None and not is_encoder_classifier(inner):
        model = with_score_head(model, tokenizer, scores=count, what="as_classifier")
        set_classes(model, named(count))
    elif inner.config.num_labels != count:
        raise ConfigError(
            f"as_classifier: expected a classifier of {count} classes, got one of {inner.config.num_labels}. "
            "Name all of its classes: labels=[...]; or load it with another head: "
            f'load(name, task="classification", num_labels={count}).'
        )
    if isinstance(classes, Classes):
        set_classes(model, classes)
    elif classes_of(model) is None:
        names = cast(dict[int, str], inner.config.id2label)
        set_classes(model, Classes(tuple(names[k] for k in range(count))))
    return model


def named(count: int) -> Classes:
    """Classes that nobody has named, as transformers calls them.

    Example:
        >>> named(2).names
        ('LABEL_0', 'LABEL_1')
    """
    return Classes(tuple(f"LABEL_{k}" for k in range(count)))


def check_head_alone_is_new(model: PreTrainedModel, report: Mapping[str, Any], name: str) -> None:
    """Weights that a checkpoint lacks, or has in another size, must be those of the head.

    Raises:
        CapabilityError: an architecture without such a head.
        CheckpointError: others would be random too, or a decoder's score head, which is made elsewhere.
    """
    decoders = score_head(model)
    head = list(encoder_head(model).values()) if decoders is None else [decoders]
    if not head:
        raise CapabilityError(
            f"load: expected a class with a head for classification, got {type(model).__name__} at {name}."
        )
    resized = {entry if isinstance(entry, str) else entry[0] for entry in report["mismatched_keys"]}
    missing = set(report["missing_keys"])
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    heads = {id(weight) for module in head for weight in module.parameters()}
    allowed = {key for key in resized | missing if key in weights and id(weights[key]) in heads}
    other = sorted((resized | missing) - allowed) if decoders is None else sorted(missing | resized - allowed)
    if other:
        raise CheckpointError(
            f"load: expected all weights of {type(model).__name__} at {name}, missing {len(other)}: "
            f"{', '.join(other[:3])}. They would be random; the checkpoint is of another class, or damaged."
        )
    if resized:
        logger.warning(
            "%s: its head is of another number of classes and is not used: %s",
            name,
            ", ".join(sorted(resized)),
        )
    if allowed:
        logger.info("%s: a new head, drawn at random: %s", name, ", ".join(sorted(allowed)))
