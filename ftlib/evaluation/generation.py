"""Completions of prompts that are token ids: batched, in the order they came, model and settings untouched.

transformers generates. Added here: batches of like length with the padding on the left, whatever the
tokenizer's own side (for an encoder on the right); a generation config of its own; and modes and random
state put back afterwards.

Shapes: B prompts of a batch, L positions of the longest, N of what is returned.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ftlib.adapters.attach import AnyModel
from ftlib.checks import COUNT, SWITCH, check
from ftlib.errors import CapabilityError, ConfigError, DataError
from ftlib.models.modes import evaluation_mode
from ftlib.models.parts import context_length, context_words, inner_model, language_task
from ftlib.models.virtual import LeftPadded, virtual_tokens

__all__ = ["decode", "generate"]

_NO_STOP = [2**31 - 1]  # an id of no vocabulary; None would stand for the model's own
# Settings with an argument of their own here, or that change what is returned.
_OWNED = {
    "bos_token_id": "prompts hold their own ids",
    "eos_token_id": "pass stop_ids",
    "max_length": "pass max_new_tokens",
    "num_return_sequences": "repeat the prompt",
    "output_attentions": "call the model",
    "output_hidden_states": "call the model",
    "output_logits": "call the model",
    "output_scores": "call the model",
    "pad_token_id": "padding never shows in a completion",
    "return_dict_in_generate": "call the model",
}
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


def generate(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    max_new_tokens: int = 128,
    do_sample: bool = False,
    batch_size: int = 8,
    seed: int | None = None,
    **generation_options: Any,
) -> list[list[int]]:
    """Token ids of one completion per prompt.

    Args:
        model: a decoder or an encoder-decoder, with or without adapters; its mode is put back afterwards.
        tokenizer: gives the id to pad with; None or one without a pad token pads with a stop id.
        prompts: token ids, at least one each.
        stop_ids: ids that end a completion; empty goes on to `max_new_tokens`.
        max_new_tokens: per completion, >= 1; fewer where the model's context ends.
        do_sample: draw tokens; False takes the likeliest.
        batch_size: prompts per forward, >= 1. Changes the speed; in float32 not the greedy result.
        seed: of the draws; the global random state is put back afterwards. None draws from the global
            one. Only with `do_sample`.
        generation_options: further settings of `transformers.GenerationConfig`, such as ``temperature``;
            what is not given comes from the model's own, as in transformers.

    Returns:
        Completions without their prompts, in the order of `prompts`, each up to and with its stop id.

    Raises:
        CapabilityError: a model that writes nothing, such as a reward model.
        ConfigError: an unknown option (the nearest name is given), one without effect, or a prompt
            that fills the model's context.
        DataError: an empty prompt.

    Example:
        >>> ids = generate(model, tokenizer, [[5, 6, 7]], stop_ids=[2])  # doctest: +SKIP
    """
    inner = inner_model(model)
    if not inner.can_generate():
        raise CapabilityError(
            f"generate: expected a causal language model, got {type(inner).__name__}. "
            "Load one with ftlib.load(name)."
        )
    virtual = virtual_tokens(model)
    settings = _settings(tokenizer, stop_ids, max_new_tokens, do_sample, seed, generation_options)
    check("generate", {"batch_size": (batch_size, COUNT)})
    apart = language_task(model) == "seq2seq_lm"  # returned are a start token and the completion alone
    if virtual is not None and not apart:
        _require_cache(settings)
    room = _room(model, prompts, max_new_tokens, apart=apart)
    device = cast(nn.Embedding, inner.get_input_embeddings()).weight.device
    write = cast(Callable[..., Tensor], inner.generate)
    completions: list[list[int]] = [[] for _ in prompts]
    with evaluation_mode(model), _draws(seed, device), torch.no_grad():
        for batch in _batches(
            prompts, room, batch_size, alike=virtual is not None and virtual.unpadded(inner)
        ):
            rows = [prompts[index] for index in batch]
            ids_BL, mask_BL = _padded(rows, settings.pad_token_id, device, left=not apart)
            settings.max_new_tokens = room[batch[0]]
            inputs = {"input_ids": ids_BL, "attention_mask": mask_BL}
            if virtual is not None and apart:
                inputs = virtual.before_text(inner.get_encoder(), ids_BL, mask_BL)
            elif virtual is not None:
                padded = virtual.left_padded(inner, ids_BL, mask_BL, copies=settings.num_beams or 1)
                inputs = _with_virtual(padded, settings.pad_token_id)
            first = 1 if apart else inputs["input_ids"].shape[1]
            ids_BN = write(**inputs, generation_config=settings)
            for index, row in zip(batch, ids_BN[:, first:].tolist(), strict=True):
                completions[index] = _until_stop(row, stop_ids)
    return completions


def decode(
    tokenizer: PreTrainedTokenizerBase,
    completions: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int] = (),
) -> list[str]:
    """Completions as text, without their stop token and without special tokens.

    Args:
        tokenizer: of the model that wrote them.
        completions: token ids, as `generate` returns them.
        stop_ids: the first of these and all after it are left out.
    """
    kept = [_until_stop(row, stop_ids) for row in completions]
    kept = [row[:-1] if row and row[-1] in stop_ids else row for row in kept]
    return [
        str(tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for row in kept
    ]


def _settings(
    tokenizer: PreTrainedTokenizerBase | None,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    do_sample: bool,
    seed: int | None,
    options: dict[str, Any],
) -> GenerationConfig:
    """A generation config of our own, from checked options."""
    check("generate", {"max_new_tokens": (max_new_tokens, COUNT), "do_sample": (do_sample, SWITCH)})
    known = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    for name in options:
        if name in _OWNED:
            raise ConfigError(f"generate: {name} has no effect here: {_OWNED[name]}.")
        if name not in known:
            near = difflib.get_close_matches(name, known - _OWNED.keys(), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "see transformers.GenerationConfig."
            raise ConfigError(f"generate: unknown option {name!r}: {hint}")
    if not do_sample:
        idle = [name for name in _SAMPLING if name in options] + (["seed"] if seed is not None else [])
        if idle:
            raise ConfigError(f"generate: {', '.join(idle)} has no effect without do_sample=True.")
        # The model's own sampling settings would be merged in, and warned of.
        options = options | dict.fromkeys(("temperature", "top_p", "typical_p"), 1.0) | {"top_k": 50}
    pad = None if tokenizer is None else tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        eos_token_id=list(stop_ids) or _NO_STOP,
        pad_token_id=pad if pad is not None else next(iter(stop_ids), 0),  # masked, so any id would do
        num_return_sequences=1,
        return_dict_in_generate=False,
        **({"use_cache": True} | options),
    )


def _with_virtual(padded: LeftPadded, pad: int | None) -> dict[str, Any]:
    """What transformers goes on from: an id for every column of the mask, the pad's for virtual tokens."""
    before = padded.mask_RL.shape[1] - padded.ids_RL.shape[1]
    ids_RL = nn.functional.pad(padded.ids_RL, (before, 0), value=pad or 0)
    more = {"inputs_embeds": padded.embeds_RLD, "past_key_values": padded.cache}
    given = {name: value for name, value in more.items() if value is not None}
    return {"input_ids": ids_RL, "attention_mask": padded.mask_RL, **given}


def _require_cache(settings: GenerationConfig) -> None:
    """Virtual tokens are read once, and then stay in the cache."""
    named = {"use_cache": settings.use_cache is False, "cache_implementation": settings.cache_implementation}
    clashing = [name for name, value in named.items() if value]
    if clashing:
        raise ConfigError(
            f"generate: {' and '.join(clashing)} cannot be chosen with virtual tokens, which are read once "
            "and then stay in a growing cache. Leave it out."
        )


def _room(
    model: AnyModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, apart: bool
) -> list[int]:
    """Tokens each prompt may add: as many as asked for, and no more than the model's context holds.

    `apart`: prompts have a context of their own, beside that of the completions.
    """
    context = context_length(model)
    room = []
    for row, prompt in enumerate(prompts, start=1):
        if len(prompt) == 0:
            raise DataError(
                "expected at least one token, got none. Start the prompt with the BOS token.",
                code="empty_prompt",
                file="<prompts>",
                row=row,
            )
        used = 1 if apart and len(prompt) <= (context or 0) else len(prompt)  # apart: the start token
        room.append(max_new_tokens if context is None else min(max_new_tokens, context - used))
        if room[-1] < 1:
            raise ConfigError(
                f"generate: expected prompts shorter than the model's {context_words(model)}, got "
                f"{len(prompt)} in prompt {row}. Shorten it."
            )
    return room


def _batches(
    prompts: Sequence[Sequence[int]], room: list[int], batch_size: int, *, alike: bool
) -> Iterator[list[int]]:
    """Indices of prompts of like length, or of the same if `alike`, and of equal room; the longest first."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for _, equal in groupby(order, key=lambda index: (room[index], len(prompts[index]) if alike else 0)):
        batch = list(equal)
        for start in range(0, len(batch), batch_size):
            yield batch[start : start + batch_size]


def _padded(
    prompts: Sequence[Sequence[int]], pad: int | None, device: torch.device, *, left: bool
) -> tuple[Tensor, Tensor]:
    """Ids int64 [B, L] and attention mask int64 [B, L]; the mask comes from lengths, never from ids."""
    side = "left" if left else "right"
    ids_BL = pad_sequence(
        [torch.tensor(prompt) for prompt in prompts],
        batch_first=True,
        padding_value=pad or 0,
        padding_side=side,
    )
    mask_BL = pad_sequence(
        [torch.ones(len(prompt), dtype=torch.int64) for prompt in prompts],
        batch_first=True,
        padding_side=side,
    )
    return ids_BL.to(device), mask_BL.to(device)


def _until_stop(row: Sequence[int], stop_ids: Sequence[int]) -> list[int]:
    """The row up to and with its first stop id."""
    end = next((place for place, token in enumerate(row) if token in stop_ids), len(row))
    return list(row[: end + 1])


@contextmanager
def _draws(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draws from a seeded global generator, whose state comes back after the scope."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type="cuda"):
        torch.manual_seed(seed)
        yield
