"""Load a model and its tokenizer, ready to train: weights from safetensors or GGUF, adapter attached.

transformers and peft do the loading (`reading.py`, `adapters.attach`). Added here: a look at the files before
anything is built, the choice of dtype, and a model that is of its task.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import cast, overload

import torch
from peft import PeftConfig, PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ftlib.adapters.adapter import Adapter
from ftlib.adapters.attach import attach
from ftlib.adapters.encoder_head import is_encoder_classifier
from ftlib.adapters.task import score_head
from ftlib.adapters.tokens import saved_tokens
from ftlib.adapters.vetting import check_adapter
from ftlib.errors import CheckpointError, ConfigError
from ftlib.models.classifiers import as_classifier, count_labels, is_encoder
from ftlib.models.heads import as_reward_model
from ftlib.models.padding import padding_tokenizer
from ftlib.models.parts import inner_model
from ftlib.models.precision import choose_dtype, parse_dtype
from ftlib.models.quantise import classifier_linears, parse_quantisation, quantised_loading
from ftlib.models.quiet import quiet
from ftlib.models.reading import (
    auto_class,
    is_classifier,
    read_classifier,
    read_config,
    read_model,
    read_tokenizer,
)
from ftlib.models.source import Source, find_source

__all__ = ["load"]

logger = logging.getLogger(__name__)
TASKS = ("causal_lm", "seq2seq_lm", "masked_lm", "classification", "reward")

AnyModel = PreTrainedModel | PeftModel
AnyAdapter = Adapter | PeftConfig | str | Path


@overload
def load(
    name_or_path: str | Path,
    *,
    adapter: AnyAdapter | None = ...,
    task: str = ...,
    dtype: str | torch.dtype = ...,
    quantize: str | None = ...,
    gguf_file: str | None = ...,
    num_labels: int | None = ...,
    revision: str | None = ...,
    token: str | bool | None = ...,
    local_files_only: bool = ...,
    device: str | torch.device | None = ...,
    trust_remote_code: bool = ...,
) -> tuple[AnyModel, PreTrainedTokenizerBase]: ...
@overload
def load(
    name_or_path: AnyModel,
    *,
    adapter: AnyAdapter | None = ...,
    task: str = ...,
    num_labels: int | None = ...,
) -> tuple[AnyModel, PreTrainedTokenizerBase | None]: ...
def load(
    name_or_path: str | Path | AnyModel,
    *,
    adapter: AnyAdapter | None = None,
    task: str = "causal_lm",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    gguf_file: str | None = None,
    num_labels: int | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> tuple[AnyModel, PreTrainedTokenizerBase | None]:
    """A model and its tokenizer.

    Args:
        name_or_path: a hub name, a local folder, or a GGUF file, which is dequantised into an ordinary
            model. Or a loaded model, which gets the adapter; its tokenizer is looked for where the model
            came from, on this machine only, and is None where there is none.
        adapter: what `ftlib.adapters` makes, any `peft.PeftConfig`, or a saved adapter's folder. The base
            is always the model named here; where a saved one trained new tokens, the tokenizer is the one
            saved with it. None leaves the model as it is.
        task: "causal_lm"; "seq2seq_lm", for encoder-decoders such as T5; "masked_lm", for encoders that fill
            in masks; or "reward" or "classification": transformers' model for sequence classification with
            one score, or one per class. A language model gets a new score head, float32 and drawn from
            torch's global generator (see `as_reward_model`), an encoder its architecture's own head, drawn
            likewise; a trained classifier, reward model, or adapter keeps its own.
        dtype: of the weights: a torch dtype, its name, or "auto". Auto is bfloat16 for weights that an
            adapter leaves frozen and for checkpoints in half precision (GGUF counts as one), where the
            device computes it fast; else float32. The choice is logged. What an adapter adds is float32;
            modules it trains whole keep the model's dtype, and a trainer keeps float32 masters of them.
        quantize: "nf4" or "int8" holds the linear layers of the base in 4 or 8 bits, frozen, for an adapter
            to be trained on; None does not. It needs the extra ``quant``.
        gguf_file: name of a GGUF file inside the folder or hub model.
        num_labels: classes of task="classification"; None takes those of a classifier's checkpoint, or of a
            saved adapter.
        revision: of a hub model: branch, tag or commit.
        token: for private hub models; None takes the one stored by the hub's own login.
        local_files_only: never reach the network.
        device: where to put the model; None is the CPU, from where a trainer moves it, or for a quantised
            one the accelerator, if there is one.
        trust_remote_code: run code that comes with the model.

    Returns:
        (model, tokenizer), the model in evaluation mode as transformers leaves it, the tokenizer as it
        is; but one for a decoder with a score head pads with the id that the model takes for padding.

    Raises:
        ConfigError: nothing found, an option that does not fit, or files that are refused.
        CheckpointError: weights that cannot be read or do not fit the model.
        CapabilityError: a model that cannot do the task.
        MissingPackageError: a GGUF file without the package that reads it, or `quantize` without
            bitsandbytes.
    """
    _check_options(task, num_labels)
    if isinstance(adapter, str | Path):
        adapter = Path(adapter).expanduser()
        check_adapter(adapter)  # before a base of any size is read
    if isinstance(name_or_path, PreTrainedModel | PeftModel):
        given = {"gguf_file": gguf_file, "revision": revision, "token": token, "device": device}
        clashing = [name for name, value in given.items() if value is not None]
        clashing += ["dtype"] if dtype != "auto" else []
        clashing += ["quantize"] if quantize is not None else []
        if clashing:
            raise ConfigError(f"load: {', '.join(clashing)} has no effect on a loaded model. Leave it out.")
        inner = _inner(name_or_path)
        _check_kind(inner.config, task, type(inner).__name__)
        tokenizer = _tokenizer_beside(name_or_path)
        if task == "classification":
            inner = inner_model(name_or_path)
            own = inner.config if inner.get_output_embeddings() is None else None
            num_labels = count_labels(num_labels, adapter, own)
        return _finish(name_or_path, tokenizer, task, adapter, num_labels)
    source = find_source(
        name_or_path,
        gguf_file=gguf_file,
        revision=revision,
        token=token,
        local_files_only=local_files_only,
        trust_remote_code=trust_remote_code,
    )
    packed = parse_quantisation(quantize, gguf_file=source.gguf_file)
    place = None if device is None else _parse_device(device)
    tokenizer = read_tokenizer(_words_of(adapter) or source, trust_remote_code=trust_remote_code)
    config = read_config(source, trust_remote_code=trust_remote_code)
    _check_kind(config, task, source.name)
    scores = is_classifier(config) and task in ("classification", "reward")
    encodes = task == "classification" and is_encoder(config)
    if task == "classification":
        num_labels = count_labels(num_labels, adapter, config if scores else None)
    # an encoder is small, and its own forward takes body and head in one dtype
    full = isinstance(adapter, Adapter) and adapter.config is None
    frozen = packed is not None or (adapter is not None and not full)
    chosen = _dtype(dtype, config, source, frozen=frozen and not encodes, device=place)
    heads = classifier_linears(config) if packed is not None and (scores or encodes) else ()
    source = replace(source, loading=quantised_loading(packed, chosen, place, heads))
    if scores or encodes:
        model = read_classifier(source, config, chosen, num_labels, tokenizer, trust_remote_code)
    else:
        model = read_model(source, config, chosen, auto_class(config, task), trust_remote_code)
    if place is not None and packed is None:
        torch.nn.Module.to(model, place)
    return _finish(model, tokenizer, task, adapter, num_labels)


def _finish(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase | None,
    task: str,
    adapter: AnyAdapter | None,
    num_labels: int | None,
) -> tuple[AnyModel, PreTrainedTokenizerBase | None]:
    """Make the model one of its task, put the adapter on it, and let the tokenizer pad as it does."""
    if task == "reward":
        model = as_reward_model(model, tokenizer)
    elif task == "classification":
        model = as_classifier(model, cast(int, num_labels), tokenizer)
    elif score_head(model) is not None or is_encoder_classifier(model):
        raise ConfigError(
            f"load: expected a language model for task={task!r}, got one with a score head. "
            "Pass task='reward' or 'classification'."
        )
    if task in ("reward", "classification") and tokenizer is not None:
        tokenizer = padding_tokenizer(model, tokenizer)
    if adapter is not None:
        with quiet():
            model = attach(model, adapter, tokenizer=tokenizer)
    return model, tokenizer


def _check_options(task: str, num_labels: int | None) -> None:
    if task not in TASKS:
        raise ConfigError(f"load: expected task to be one of {TASKS}, got {task!r}. No other is available.")
    if num_labels is not None and task != "classification":
        raise ConfigError(f"load: num_labels={num_labels} has no effect on task={task!r}. Leave it out.")


def _check_kind(config: PretrainedConfig, task: str, name: str) -> None:
    """Whether the model is an encoder-decoder must be what the task says."""
    if config.is_encoder_decoder and task != "seq2seq_lm":
        raise ConfigError(
            f"load: expected task='seq2seq_lm' for the encoder-decoder {name}, got task={task!r}. Pass "
            "task='seq2seq_lm'; a trainer takes the model that this gives."
        )
    if task == "seq2seq_lm" and not config.is_encoder_decoder:
        raise ConfigError(
            f"load: expected an encoder-decoder for task='seq2seq_lm', got {name} of the kind "
            f"{config.model_type!r}. Leave task out for a decoder."
        )


def _parse_device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"load: expected a device such as 'cpu' or 'cuda:0', got {device!r}.") from error


def _dtype(
    dtype: str | torch.dtype,
    config: PretrainedConfig,
    source: Source,
    *,
    frozen: bool,
    device: torch.device | None,
) -> torch.dtype:
    """The dtype asked for, or the one that auto stands for, logged."""
    if dtype != "auto":
        return parse_dtype(dtype)
    stored = torch.bfloat16 if source.gguf_file else cast(torch.dtype | None, config.dtype)
    chosen, reason = choose_dtype(stored=stored, frozen=frozen, device=device)
    logger.info("%s: weights in %s: %s", source.name, str(chosen).removeprefix("torch."), reason)
    return chosen


def _words_of(adapter: AnyAdapter | None) -> Source | None:
    """Where the tokenizer of a saved adapter is that trained new tokens, which its base does not know."""
    if not isinstance(adapter, Path) or not (adapter / "tokenizer_config.json").is_file():
        return None
    return Source(adapter, None, str(adapter)) if saved_tokens(adapter) else None


def _tokenizer_beside(model: AnyModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a loaded model, if the place it came from is on this machine."""
    inner = _inner(model)
    if not inner.name_or_path:
        return None
    try:
        source = find_source(inner.name_or_path, local_files_only=True)
        return read_tokenizer(source, trust_remote_code=False)
    except (ConfigError, CheckpointError):
        return None


def _inner(model: AnyModel) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
