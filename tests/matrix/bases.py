"""The models of the matrix: two layers, the same at every call, plain or held by bitsandbytes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from ftlib.adapters import attach, lora
from ftlib.adapters.quantised import steady
from ftlib.models import load, on_same_base
from ftlib.models.quantise import Quantisation, quantised_loading
from ftlib.models.quiet import quiet
from tests.encoders import encoder as classifier
from tests.encoders import saved_encoder
from tests.models.masked_zoo import tiny_masked
from tests.models_zoo import tiny_model
from tests.seq2seq import t5_model

__all__ = ["decoder", "encoder", "masked", "shared", "t5"]

WIDTH, WIDE = 48, 64  # bitsandbytes holds whole blocks of 64 weights in every row


def decoder(held: Quantisation | None = None, **changes: Any) -> PreTrainedModel:
    """A Llama, with changes of its configuration."""
    width = WIDTH if held is None else WIDE
    model = tiny_model(hidden_size=width, head_dim=width // 4, intermediate_size=2 * width, **changes)
    return _held(model, held, AutoModelForCausalLM)


def encoder(held: Quantisation | None = None) -> PreTrainedModel:
    """A BERT with a head of three classes."""
    if held is None:
        return classifier(hidden_size=WIDTH, intermediate_size=2 * WIDTH)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)  # of the head
        saved = saved_encoder(Path(folder), hidden_size=WIDE, intermediate_size=2 * WIDE)
        model, _ = load(saved, task="classification", num_labels=3, dtype="float32", quantize=held)
    model.name_or_path = model.config.name_or_path = ""  # the folder is gone
    return model


def masked(held: Quantisation | None = None) -> PreTrainedModel:
    """A BERT that fills masks."""
    width = WIDTH if held is None else WIDE
    model = tiny_masked(hidden_size=width, intermediate_size=2 * width)
    return _held(model, held, type(model))


def t5(held: Quantisation | None = None) -> PreTrainedModel:
    """A T5."""
    width = WIDTH if held is None else WIDE
    model = t5_model(d_model=width, d_kv=width // 4, d_ff=2 * width)
    return _held(model, held, AutoModelForSeq2SeqLM)


def shared(held: Quantisation | None = None) -> PreTrainedModel:
    """A second Llama around the base of a policy with LoRA, for another role."""
    with torch.random.fork_rng(devices=[]):
        return on_same_base(attach(decoder(held), lora(4)))


def _held(model: PreTrainedModel, held: Quantisation | None, auto: Any) -> PreTrainedModel:
    """The model, or a quantised copy of it as `ftlib.load` makes one."""
    if held is None:
        return model
    with tempfile.TemporaryDirectory() as folder, quiet():
        model.save_pretrained(folder)
        made: PreTrainedModel = auto.from_pretrained(
            folder, dtype=torch.float32, **quantised_loading(held, torch.float32, None)
        )
    steady(made)
    made.name_or_path = made.config.name_or_path = ""  # the folder is gone
    return made.requires_grad_(False)
