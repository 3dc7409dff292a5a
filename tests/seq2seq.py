"""A tiny random T5, what it says of one continuation at a time, and rows of text for it.

Shapes: N scored rows, C continuations, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
)

from ftlib.batches import Group
from tests.data.tokenizers_zoo import tiny
from tests.models_zoo import EOS, PAD, VOCAB

__all__ = ["COUPLES", "ROWS", "SHAPES", "START", "Own", "own_states", "t5_config", "t5_model", "t5_tokenizer"]

START = PAD  # as in T5
WEIGHT_STD = 0.2  # added to the usual weights: a wrong mask then changes the logits by far more than rounding
# tokens of the prompt and of each continuation: a single one, pairs, samples
SHAPES = ((5, (3,)), (13, (4, 9)), (1, (2, 1)), (3, (1, 2, 7)))

ROWS = [
    {"prompt": "What does it do?", "completion": "It copies a file."},
    {"prompt": "Paris", "completion": "the capital of France"},
    {"prompt": "hello there", "completion": "yes indeed"},
]
COUPLES = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
    for row, other in zip(ROWS, [*ROWS[1:], ROWS[0]], strict=True)
]


SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": START,
}


def t5_config(**changes: Any) -> T5Config:
    """Two layers of width 32 without dropout."""
    settings = SMALL | {"pad_token_id": PAD, "eos_token_id": EOS}
    return T5Config(**(settings | changes))


def t5_model(*, config: PretrainedConfig | None = None, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Random weights that depend on `seed` alone, in evaluation mode; of `config`, or a T5 with `changes`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(config or t5_config(**changes))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(WEIGHT_STD * torch.randn(weight.shape))
    return model.eval()


def t5_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """SentencePiece-like; ends plain text in EOS and has no chat template, as T5's."""
    return tiny("unigram", **({"template": None, "eos": True} | options))


class Own(NamedTuple):
    """What the model itself says, from a plain forward of one continuation at a time."""

    logprobs_N: Tensor
    entropy_N: Tensor
    last_CD: Tensor


def own_states(model: PreTrainedModel, groups: Sequence[Group], *, temperature: float = 1.0) -> Own:
    """Of every continuation token, and of the state after the last one."""
    logprobs, entropies, last = [], [], []
    for member in groups:
        for ids in member.continuation_ids:
            start = torch.tensor([model.config.decoder_start_token_id])
            seen: list[Tensor] = []
            handle = model.get_decoder().register_forward_hook(
                lambda _, __, output, seen=seen: seen.append(output.last_hidden_state)
            )
            logits_LV = model(
                input_ids=member.prefix_ids[None], decoder_input_ids=torch.cat([start, ids])[None]
            ).logits[0]
            handle.remove()
            logprobs_LV = (logits_LV[:-1] / temperature).log_softmax(-1)
            logprobs.append(logprobs_LV.gather(-1, ids[:, None])[:, 0])
            entropies.append(-(logprobs_LV.exp() * logprobs_LV).sum(-1))
            last.append(seen[0][0, -1])
    return Own(torch.cat(logprobs), torch.cat(entropies), torch.stack(last))
