"""EVA: LoRA whose first factor points where the inputs of its layer vary most, seen on data.

    A = the top right singular vectors of the layer's inputs, B = 0

Layers whose inputs vary in more directions get a higher rank, at most `RHO` times the one asked for, so
that the sum of ranks stays. peft computes it.

Source: Paischer et al. 2024 (arXiv:2410.07170), section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from peft import EvaConfig, LoraConfig, PeftConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftlib.errors import CapabilityError, ConfigError, DataError

__all__ = ["RHO", "fit_eva", "set_eva"]

RHO = 2.0
_TOKENS = 256  # least number in one step of the decomposition
_NEEDS_DATA = ("eva", "lora_ga")  # plain LoRA without


def fit_eva(config: PeftConfig, model: nn.Module, data: Any) -> None:
    """Let an adapter to be made from data start as a plain LoRA; `set_eva` then gives it its factors.

    Raises:
        ConfigError: there are no data. peft would go on with a plain LoRA, silently.
        CapabilityError: an encoder-decoder, whose layers see two texts, where peft takes one.
    """
    if not isinstance(config, LoraConfig) or config.init_lora_weights not in _NEEDS_DATA:
        return
    if data is None:
        raise ConfigError(
            f"attach: expected data for init={config.init_lora_weights!r}, got none, which is plain LoRA. "
            "Give them: ftlib.adapters.lora(init='eva', data=ftlib.Encoder(tokenizer)(records))."
        )
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise CapabilityError(
            f"attach: expected a model that reads one text for init={config.init_lora_weights!r}, got the "
            f"encoder-decoder {type(inner).__name__}. Take ftlib.adapters.lora(), or init='pissa'."
        )
    config.init_lora_weights, config.eva_config = True, None


def set_eva(model: PeftModel, name: str, data: Any) -> None:
    """Compute the factors of a fresh adapter, whose configuration stays that of a plain LoRA.

    Args:
        model: with the adapter, which is active.
        name: the adapter's.
        data: encoded examples, rows with ``input_ids``, or lists of ids.

    Raises:
        DataError: rows of another kind, or fewer tokens than directions.
    """
    config = cast(LoraConfig, model.peft_config[name])
    most = int(RHO * config.r)
    batches = list(_batches([_ids(row) for row in data], max(_TOKENS, 4 * most), model.device))
    if not batches or int(batches[0]["attention_mask"].sum()) < most:
        raise DataError(f"eva: expected at least {most} tokens of data, {RHO:g} r. Give more examples.")
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=RHO)
    with torch.random.fork_rng(devices=[]):
        initialize_lora_eva_weights(
            model,
            batches,
            forward_fn=_run_body,
            adapter_name=name,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    cast_adapter_dtype(model.base_model, adapter_name=name, autocast_adapter_dtype=True)
    config.init_lora_weights, config.eva_config = True, None  # a reader has the factors, and no data


def _run_body(model: PeftModel, inputs: Mapping[str, Tensor]) -> None:
    """Every adapted layer runs; the product with the vocabulary is left out where none is above the body."""
    modes = {module: module.training for module in model.modules()}
    inner = cast(PreTrainedModel, model.eval().get_base_model())
    adapted = {module for module in model.modules() if isinstance(module, LoraLayer)}
    try:
        (inner.base_model if adapted <= set(inner.base_model.modules()) else inner)(**inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _ids(row: Any) -> list[int]:
    if isinstance(row, Mapping) and "continuation_ids" in row:
        return [*row["prefix_ids"], *row["continuation_ids"][0]]
    if isinstance(row, Mapping) and "input_ids" in row:
        row = row["input_ids"]
    if isinstance(row, Tensor):
        row = row.tolist()
    if isinstance(row, Sequence) and all(isinstance(one, int) for one in row):
        return list(row)
    raise DataError(
        f"eva: expected encoded examples, rows with input_ids or lists of ids, got {row!r:.60}. Encode "
        "records first: data=ftlib.Encoder(tokenizer)(records)."
    )


def _batches(rows: Iterable[list[int]], least: int, device: torch.device) -> Iterable[dict[str, Tensor]]:
    """Padded batches of at least so many tokens; what is left over at the end joins the last one."""
    members: list[list[list[int]]] = [[]]
    for row in rows:
        if sum(map(len, members[-1])) >= least:
            members.append([])
        members[-1].append(row)
    if len(members) > 1 and sum(map(len, members[-1])) < least:
        members[-2] += members.pop()
    for chosen in members:
        if not chosen:
            continue
        ids = [torch.tensor(row, device=device) for row in chosen]
        yield {
            "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
            "attention_mask": nn.utils.rnn.pad_sequence(
                [torch.ones_like(one) for one in ids], batch_first=True
            ),
        }
