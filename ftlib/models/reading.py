"""What a source holds, read by transformers: configuration, weights, tokenizer.

Weights come from safetensors or GGUF. Where transformers would go on with random weights, this is an error;
the head of a classifier alone may be new.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ftlib.adapters.encoder_head import is_encoder_classifier
from ftlib.adapters.quantised import is_quantised, steady
from ftlib.errors import CheckpointError, ConfigError
from ftlib.models.classifiers import check_head_alone_is_new
from ftlib.models.heads import choose_padding, describe_score, restore_score
from ftlib.models.padding import choose_pad_id
from ftlib.models.quiet import quiet, without_load_report
from ftlib.models.source import Source
from ftlib.models.vetting import weight_files

__all__ = ["auto_class", "is_classifier", "read_classifier", "read_config", "read_model", "read_tokenizer"]


def read_config(source: Source, *, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration of a model.

    Raises:
        ConfigError: of none that transformers knows.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            source.folder, local_files_only=True, trust_remote_code=trust_remote_code, **_gguf(source)
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"load: expected a model that transformers knows at {source.name}, got: {error}"
        ) from error
    # A GGUF's title arrives under a name that no loader overwrites, and would be saved with the model.
    vars(config).pop("_model_name_or_path", None)
    return config


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether the checkpoint is one of sequence classification, by the class it was saved from."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def read_model(
    source: Source, config: PretrainedConfig, dtype: torch.dtype, auto: Any, trust_remote_code: bool
) -> PreTrainedModel:
    """A model with all of its weights; that of an encoder's new head may be drawn at random.

    Args:
        source: where they are.
        config: its configuration.
        dtype: of the weights.
        auto: transformers' class that reads them, as `auto_class` gives it.
        trust_remote_code: run code that comes with the model.

    Raises:
        ConfigError: files that this class does not read.
        CheckpointError: weights that cannot be read, or are missing.
    """
    options: dict[str, Any] = {**_gguf(source), **source.loading}
    if source.gguf_file:
        options["quantization_config"] = GgufConfig(dequantize=True)  # else the weights stay packed
    if classifies := auto is AutoModelForSequenceClassification:
        options["ignore_mismatched_sizes"] = True  # of the head, as is checked below
    try:
        with quiet(), without_load_report() if classifies else nullcontext():
            loaded: Any = auto.from_pretrained(
                source.folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **options,
            )
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"load: expected readable weights at {source.name}, got: {error}") from error
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"load: expected a model that {auto.__name__} reads at {source.name}, got: {error}"
        ) from error
    model, report = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    if classifies:
        check_head_alone_is_new(model, report, source.name)
    elif missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"load: expected all weights of {type(model).__name__} at {source.name}, missing {len(missing)}: "
            f"{', '.join(missing[:3])}. They would be random; the checkpoint is of another class, or damaged."
        )
    model.config.name_or_path = model.name_or_path = source.name
    if is_quantised(model):
        steady(model)
        model.requires_grad_(False)  # what is not quantised is part of a frozen base
    return model


def read_classifier(
    source: Source,
    config: PretrainedConfig,
    dtype: torch.dtype,
    num_labels: int | None,
    tokenizer: PreTrainedTokenizerBase,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """With the head of the checkpoint; of an encoder, a new one where it has none of that size."""
    if num_labels is not None:
        config.num_labels = num_labels
    model = read_model(source, config, dtype, AutoModelForSequenceClassification, trust_remote_code)
    if num_labels is None or not is_encoder_classifier(model):
        restore_score(model, [source.folder / file for file in weight_files(source.folder, source.name)])
        choose_padding(model, choose_pad_id(model, tokenizer))
        if num_labels is None and config.num_labels == 1:  # several are refused where the model is finished
            describe_score(model)
    return model


def auto_class(config: PretrainedConfig, task: str) -> Any:
    """Transformers' class that reads a language model for a task."""
    if task == "masked_lm":
        return AutoModelForMaskedLM
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def read_tokenizer(source: Source, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        ConfigError: no tokenizer.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=trust_remote_code, **_gguf(source)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ConfigError(
            f"load: expected a tokenizer (tokenizer.json or vocabulary files) at {source.name}, got: {error}"
        ) from error
    tokenizer.name_or_path = source.name
    return tokenizer


def _gguf(source: Source) -> dict[str, str]:
    return {"gguf_file": source.gguf_file} if source.gguf_file else {}
