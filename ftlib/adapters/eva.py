"""EVA: LoRA whose first factor points where the inputs of its layer vary most, seen on data.

    A = the top right singular vectors of the layer's inputs, B = 0

Layers whose inputs vary in more directions get a higher rank, at most `RHO` times the one asked for, so
that the sum of ranks stays. peft computes it. The layers of an encoder-decoder see two texts: its encoder
and the keys and values of its cross-attention the prompt, the rest of its decoder the completion.

Source: Paischer et al. 2024 (arXiv:2410.07170), section 3.

Shapes: B rows, L columns, T tokens that count, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from peft import EvaConfig, LoraConfig, PeftConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor
from transformers import PreTrainedModel

from ftlib.errors import ConfigError, DataError

__all__ = ["RHO", "fit_eva", "set_eva"]

RHO = 2.0
_TOKENS = 256  # least number in one step of the decomposition
_NEEDS_DATA = ("eva", "lora_ga")  # plain LoRA without


def fit_eva(config: PeftConfig, data: Any) -> None:
    """Let an adapter to be made from data start as a plain LoRA; `set_eva` then gives it its factors.

    Raises:
        ConfigError: there are no data. peft would go on with a plain LoRA, silently.
    """
    if not isinstance(config, LoraConfig) or config.init_lora_weights not in _NEEDS_DATA:
        return
    if data is None:
        raise ConfigError(
            f"attach: expected data for init={config.init_lora_weights!r}, got none, which is plain LoRA. "
            "Give them: ftlib.adapters.lora(init='eva', data=ftlib.Encoder(tokenizer)(records))."
        )
    config.init_lora_weights, config.eva_config = True, None


def set_eva(model: PeftModel, name: str, data: Any) -> None:
    """Compute the factors of a fresh adapter, whose configuration stays that of a plain LoRA.

    Args:
        model: with the adapter, which is active.
        name: the adapter's.
        data: encoded examples; for a model that reads one text also rows with ``input_ids``, or lists of ids.

    Raises:
        DataError: rows of another kind, or fewer tokens than directions.
    """
    config = cast(LoraConfig, model.peft_config[name])
    most = int(RHO * config.r)
    base: Any = model.get_base_model().config
    start = base.decoder_start_token_id if base.is_encoder_decoder else None
    texts = [(_ids(row),) if start is None else _both_ids(row, start) for row in data]
    batches = list(_batches(texts, max(_TOKENS, 4 * most), model.device))
    if not batches or min(int(mask.sum()) for mask in _masks(batches[0]).values()) < most:
        what = "tokens of data" if start is None else "tokens of prompts, and of completions"
        raise DataError(f"eva: expected at least {most} {what}, {RHO:g} r. Give more examples.")
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=RHO)
    with torch.random.fork_rng(devices=[]):
        initialize_lora_eva_weights(
            model,
            batches,
            forward_fn=_run_body,
            prepare_model_inputs_fn=lambda inputs, _: _masks(inputs),
            prepare_layer_inputs_fn=lambda inputs, masks, _: _without_pads(inputs, masks),
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


def _masks(inputs: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """What counts of each text, by its number of columns, which no two texts of a batch share."""
    return {mask.shape[1]: mask.bool() for key, mask in inputs.items() if key.endswith("attention_mask")}


def _without_pads(inputs: Any, masks: Mapping[int, Tensor]) -> Tensor:
    """[T, I], of the text that a layer sees."""
    inputs_BLI: Tensor = inputs if isinstance(inputs, Tensor) else inputs[0]
    return inputs_BLI[masks[inputs_BLI.shape[1]]]


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


def _both_ids(row: Any, start: int) -> tuple[list[int], list[int]]:
    """What encoder and decoder read of an example: the prompt, and the completion behind the start token."""
    if not (isinstance(row, Mapping) and row.get("prefix_ids") and row.get("continuation_ids")):
        raise DataError(
            f"eva: expected encoded examples with prompt and completion for an encoder-decoder, got "
            f"{row!r:.60}. "
            'Encode records first: data=ftlib.Encoder(tokenizer, task="seq2seq_lm")(records).'
        )
    return list(row["prefix_ids"]), [start, *row["continuation_ids"][0][:-1]]


def _batches(
    rows: Iterable[tuple[list[int], ...]], least: int, device: torch.device
) -> Iterable[dict[str, Tensor]]:
    """Padded batches of at least so many tokens of each text; what is left at the end joins the last one."""

    def tokens(chosen: list[tuple[list[int], ...]]) -> int:
        return min((sum(map(len, texts)) for texts in zip(*chosen, strict=True)), default=0)

    members: list[list[tuple[list[int], ...]]] = [[]]
    for row in rows:
        if tokens(members[-1]) >= least:
            members.append([])
        members[-1].append(row)
    if len(members) > 1 and tokens(members[-1]) < least:
        members[-2] += members.pop()
    return (_padded(chosen, device) for chosen in members if chosen)


def _padded(chosen: Sequence[tuple[list[int], ...]], device: torch.device) -> dict[str, Tensor]:
    """The arguments of a forward: one text, or that of an encoder and that of a decoder."""
    made: dict[str, Tensor] = {}
    for side, texts in zip(("", "decoder_"), zip(*chosen, strict=True), strict=False):
        columns = max(map(len, texts))
        columns += columns in _masks(made)  # a pad more, so that layers tell the texts by their length
        mask_BL = torch.zeros(len(texts), columns, dtype=torch.long, device=device)
        ids_BL = torch.zeros_like(mask_BL)
        for row, text in enumerate(texts):
            ids_BL[row, : len(text)] = torch.tensor(text, device=device)
            mask_BL[row, : len(text)] = 1
        made |= {f"{side}input_ids": ids_BL, f"{side}attention_mask": mask_BL}
    return made
