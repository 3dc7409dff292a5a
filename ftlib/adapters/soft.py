"""Virtual tokens: fitted to a model, and what their weights start from.

Real embedding rows are far smaller than a draw from N(0, 1), so virtual tokens start from rows of the
vocabulary or from a text, and learn sooner.

    prompt    row i = embedding of token i
    prefix    keys and values of the tokens, as the model itself computes them: at first, that text as prompt

Source of the initialisations: Lester et al. 2021 (arXiv:2104.08691), section 3.2.

Shapes: n virtual tokens, D width of the embedding, H key/value heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal, cast, final

import torch
from peft import PeftConfig, PeftModel, PromptLearningConfig
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from ftlib.adapters.encoder_soft import require_place
from ftlib.adapters.task import score_head
from ftlib.errors import CapabilityError, ConfigError

__all__ = ["SoftStart", "Start", "fit_virtual_tokens", "set_start"]

Start = Literal["vocab", "text", "labels", "random"]
FREQUENT = 5000  # ids of a vocabulary come in the order in which pairs were merged, the frequent first


@final
@dataclass(frozen=True)
class SoftStart:
    """What virtual tokens start from.

    Args:
        init: "vocab": frequent tokens, drawn from torch's global generator. "text": the tokens of `text`,
            repeated or cut to the number there is. "labels": each label's mean embedding, then frequent
            tokens. "random": peft's own draw from N(0, 1).
        text: of "text".
        labels: of "labels".
        tokenizer: splits text and labels; None takes the one given to `attach`, or beside the model.
    """

    init: Start
    text: str | None = None
    labels: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        given = {"text": self.text is not None, "labels": bool(self.labels)}
        for name, has in given.items():
            if has is not (self.init == name):
                raise ConfigError(
                    f"adapter: expected {name} with init={name!r} and only there, got init={self.init!r} "
                    f"{'with' if has else 'without'} {name}. "
                    f"{f'Say init={name!r}.' if has else f'Give {name}=.'}"
                )
        if self.tokenizer is not None and self.init == "random":
            raise ConfigError("adapter: tokenizer has no effect with init='random'. Leave it out.")


def fit_virtual_tokens(config: PeftConfig, model: nn.Module) -> None:
    """Give a configuration of virtual tokens the widths of a model; any other is left alone.

    Those of an encoder-decoder are read by its encoder: peft would make as many again for its decoder, which
    nothing reads.

    Raises:
        CapabilityError: an encoder that would pool them, or that takes no keys and values; keys and values
            in a cache, for an encoder-decoder, or for a model that drops its cache to recompute layers.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(config, PromptLearningConfig) or not isinstance(inner, PreTrainedModel):
        return
    if not inner.can_generate() and score_head(inner) is None:
        require_place(config, inner)
    if inner.config.is_encoder_decoder:
        if config.peft_type == PeftType.PREFIX_TUNING:
            raise CapabilityError(
                f"attach: expected a decoder for a prefix, got the encoder-decoder {type(inner).__name__}: "
                "of L layers peft gives the decoder's layer j the keys and values of layer 2j mod L, and its "
                "encoder none. Take ftlib.adapters.prompt() or lora()."
            )
        config.num_transformer_submodules = 1
    if config.peft_type != PeftType.PREFIX_TUNING:
        width = cast(Tensor, inner.get_input_embeddings().weight).shape[1]
        config.token_dim = config.token_dim or width  # not always that of the hidden states
        heads = getattr(inner.config, "num_attention_heads", None)  # peft asks, by no name of DistilBERT's
        config.num_attention_heads = config.num_attention_heads or heads
    elif inner.is_activation_checkpointing:
        raise CapabilityError(
            "attach: expected a model that keeps its activations for a prefix, got one with activation "
            "checkpointing, which drops the cache that holds it. Turn it off, "
            "model.activation_checkpointing_disable(), or take ftlib.adapters.prompt()."
        )


def set_start(
    model: PeftModel, name: str, start: SoftStart, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Set the weights of the adapter `name` to what they start from.

    Raises:
        ConfigError: text without a tokenizer, or without a token.
        CapabilityError: layers whose keys and values a prefix cannot stand for.
    """
    if start.init == "random":
        return
    config = cast(PromptLearningConfig, model.peft_config[name])
    inner = cast(PreTrainedModel, model.get_base_model())
    weight = cast(Tensor, cast(Any, model.prompt_encoder)[name].embedding.weight)
    tokens = _tokens(inner, start, tokenizer, config.num_virtual_tokens)
    with torch.no_grad():
        if config.peft_type == PeftType.PREFIX_TUNING:
            weight.copy_(_keys_and_values(inner, [ids[0] for ids in tokens]))
            return
        table = cast(nn.Embedding, inner.get_input_embeddings()).weight
        rows = [table[torch.tensor(ids, device=table.device)].float().mean(0) for ids in tokens]
        weight.copy_(torch.stack(rows))


def _tokens(
    inner: PreTrainedModel, start: SoftStart, tokenizer: PreTrainedTokenizerBase | None, count: int
) -> list[list[int]]:
    """The tokens that each virtual token is the mean of."""
    splits = start.tokenizer or tokenizer
    if start.init == "vocab":
        return [[token] for token in _frequent(inner, splits, count)]
    splits = splits or _beside(inner)
    if start.init == "text":
        ids = _ids(splits, cast(str, start.text))
        return [[token] for token in islice(cycle(ids), count)]
    named = [_ids(splits, label) for label in start.labels][:count]
    return named + [[token] for token in _frequent(inner, splits, count - len(named))]


def _frequent(inner: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, count: int) -> list[int]:
    """Drawn without repetition, as far as there are that many; special tokens are left out."""
    text = inner.config.get_text_config(decoder=True)
    named = [getattr(text, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
    listed = [ids if isinstance(ids, list) else [ids] for ids in named]
    special = {one for ids in listed for one in ids} | set(tokenizer.all_special_ids if tokenizer else ())
    known = (
        cast(Tensor, inner.get_input_embeddings().weight).shape[0] if tokenizer is None else len(tokenizer)
    )
    ids = [one for one in range(min(known, FREQUENT)) if one not in special]
    drawn = [ids[place] for place in torch.randperm(len(ids)).tolist()]
    return list(islice(cycle(drawn), count))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise ConfigError(f"adapter: expected text with at least one token to start from, got {text!r}.")
    return ids


def _beside(inner: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside the model's weights, on this machine."""
    home = Path(inner.name_or_path or "")
    if inner.name_or_path and (home / "tokenizer_config.json").is_file():
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(home, local_files_only=True))
    raise ConfigError(
        "adapter: expected a tokenizer to split the text that virtual tokens start from, got none. "
        "Give the adapter one: tokenizer=."
    )


def _keys_and_values(inner: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Those of every layer, [n, layers x 2 H K], as peft's prefix encoder holds them."""
    cache = DynamicCache()  # without the config, so that a sliding window keeps all of them
    training = inner.training
    inner.eval()
    try:
        inner.base_model(
            input_ids=torch.tensor([list(ids)], device=inner.device), past_key_values=cache, use_cache=True
        )
    finally:
        inner.train(training)
    parts = [part for layer in cast(list[DynamicLayer], cache.layers) for part in (layer.keys, layer.values)]
    whole = cast(list[Tensor], [part for part in parts if part is not None])  # [1, H, n, K]
    if len(whole) != len(parts) or len({part.shape for part in whole}) != 1:
        raise CapabilityError(
            f"prefix: expected layers with keys and values of one shape, got those of "
            f"{type(inner).__name__}. Take ftlib.adapters.prompt(), which every decoder can."
        )
    return torch.cat([part[0].transpose(0, 1).flatten(1) for part in whole], 1).float()
