"""The words that tell classes apart, found by what a model puts in the gap of labelled rows.

Shapes: V vocabulary, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ftlib.adapters.attach import AnyModel
from ftlib.data.cloze import MultiWord, word_ids
from ftlib.data.encode import Encoder
from ftlib.data.formatters import cloze
from ftlib.data.tokens import TokenBackend
from ftlib.errors import ConfigError
from ftlib.models.masked import fills_masks
from ftlib.models.modes import evaluation_mode
from ftlib.models.parts import inner_model, language_task

__all__ = ["find_words"]


def find_words(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase,
    pattern: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    words: int = 1,
    candidates: Sequence[str] | None = None,
    reduce: Literal["mean", "max", "logsumexp"] = "mean",
    label: str = "label",
) -> MultiWord:
    """A verbalizer of the words whose likelihood in the gap is most particular to a class.

        ratio(w, y) = mean over rows of y of log p(w | row) - mean over the other classes of their means

    so that each class weighs the same, however many rows it has.

    Args:
        model: a causal or masked language model or an encoder-decoder.
        tokenizer: its tokenizer.
        pattern: the template, see `ftlib.formatters.cloze`.
        rows: labelled rows; only these labels are used.
        words: per class.
        candidates: words to choose from, of one token each; None takes every word of letters that the
            vocabulary holds whole.
        reduce: of the `MultiWord` made.
        label: column of the class.

    Raises:
        ConfigError: fewer than two classes in the rows, or fewer words than asked for.

    Source: Schick, Schmid and Schütze 2020 (PET with automatic labels), section 3.
    """
    classes = sorted({str(row[label]) for row in rows})
    if len(classes) < 2:
        raise ConfigError(f"find_words: expected rows of at least two classes, got {classes}.")
    backend = TokenBackend(tokenizer)
    spaced = cloze(pattern, dict.fromkeys(classes, "x")).spaced
    known = _whole_words(backend, candidates, " " if spaced else "")
    if len(known) < words * len(classes):
        raise ConfigError(
            f"find_words: expected {words * len(classes)} words of one token, got {len(known)} among the "
            "candidates."
        )
    probe = cloze(pattern, dict(zip("ab", known, strict=False)), label="")  # any two words: the gap is read
    encoder = Encoder(tokenizer, formatter=probe, task=language_task(model))
    ids_V = torch.tensor(list(known.values()))
    means = []
    for name in classes:
        data = encoder([dict(row) for row in rows if str(row[label]) == name])
        means.append(torch.stack([_gap(model, tokenizer, row)[ids_V] for row in data]).mean(0))
    means_KV = torch.stack(means)
    ratios_KV = means_KV - (means_KV.sum(0) - means_KV) / (len(classes) - 1)
    listed = list(known)
    chosen: dict[str, list[str]] = {name: [] for name in classes}
    taken: set[int] = set()
    for _ in range(words):
        for k, name in enumerate(classes):
            best = next(v for v in ratios_KV[k].argsort(descending=True).tolist() if v not in taken)
            taken.add(best)
            chosen[name].append(listed[best])
    return MultiWord(chosen, reduce)


def _whole_words(backend: TokenBackend, candidates: Sequence[str] | None, blank: str) -> dict[str, int]:
    """Word -> its one token."""
    if candidates is None:
        size = len(backend.tokenizer)
        decoded = (backend.decode([index]).strip() for index in range(size))
        candidates = list(dict.fromkeys(word for word in decoded if word.isalpha() and len(word) > 1))
    listed = word_ids(backend, [blank + word for word in candidates])
    return {word: ids[0] for word, ids in zip(candidates, listed, strict=True) if len(ids) == 1}


@torch.no_grad()
def _gap(model: AnyModel, tokenizer: PreTrainedTokenizerBase, data: Mapping[str, Any]) -> Tensor:
    """Log-probability of every token in the gap of one encoded row, float32 [V]."""
    device = next(model.parameters()).device
    before, after = data["prefix_ids"], data["continuation_ids"][0]
    with evaluation_mode(model):
        if fills_masks(model):
            size = int(sum(weight > 0 for weight in data["continuation_weights"][0]))
            ids = [*before, tokenizer.mask_token_id, *after[size:]]
            logits_V = model(input_ids=torch.tensor([ids], device=device)).logits[0, len(before)]
        elif inner_model(model).config.is_encoder_decoder:
            start = torch.tensor([[inner_model(model).config.decoder_start_token_id]], device=device)
            read = torch.tensor([before], device=device)
            logits_V = model(input_ids=read, decoder_input_ids=start).logits[0, 0]
        else:
            logits_V = model(input_ids=torch.tensor([before], device=device)).logits[0, -1]
    return torch.as_tensor(logits_V).float().cpu().log_softmax(-1)
