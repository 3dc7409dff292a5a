"""What a language model thinks of some candidates in a context: their log-probabilities.

Context and candidate are tokenised apart, so that writing the candidate would meet the same ids. The
candidates of a context are continuations of one group: a causal model or an encoder-decoder reads the
context once. A masked model reads each text whole.

Shapes: B contexts, C candidates of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ftlib.batches import Group
from ftlib.data.collate import collate
from ftlib.data.sampler import pack
from ftlib.data.tokens import Piece, TokenBackend
from ftlib.errors import ConfigError, ShapeError
from ftlib.models.forward import forward
from ftlib.models.masked import Masking, fills_masks
from ftlib.models.parts import inner_model

__all__ = ["Norm", "score"]

Norm = Literal["none", "tokens", "bytes", "pmi"]
Text = str | Sequence[int]
TOKENS = 4096  # of one forward, unless one group is longer


def score(
    model: nn.Module,
    context: Sequence[Text],
    candidates: Sequence[Text] | Sequence[Sequence[Text]],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    norm: Norm = "none",
    domain: Text | None = None,
    one_by_one: bool = False,
) -> Tensor:
    """Log-probability of each candidate in each context, the sum over its tokens.

    Args:
        model: a causal or masked language model or an encoder-decoder, plain or with adapters, in the mode
            it is in.
        context: texts or ids. For a masked model, each has the tokenizer's mask token once, where the
            candidate stands: one mask is put there per token of it.
        candidates: the same for all contexts, or a list per context, all of one length. A causal model
            sees a blank before a word as a part of the word: ``" great"``.
        tokenizer: for texts, and for the mask.
        norm: ``"tokens"`` and ``"bytes"`` divide by the size of the candidate; ``"pmi"`` subtracts its
            log-probability in `domain`. Candidates of different sizes are comparable only under a norm.
        domain: a context that says what kind of answer is asked for, such as ``"It was"``.
        one_by_one: of a masked model, the pseudo-log-likelihood: each token with the others in view.

    Returns:
        float32 [B, C], nats; differentiable unless called under `torch.no_grad`.

    Raises:
        ConfigError: options without effect or missing.
        ShapeError: no context or candidates, an empty one, or rows of different lengths.

    Source: Holtzman et al. 2021 for ``"pmi"``.
    """
    if norm not in ("none", "tokens", "bytes", "pmi"):
        raise ConfigError(f"score: expected norm as none, tokens, bytes or pmi, got {norm!r}.")
    if (norm == "pmi") != (domain is not None):
        raise ConfigError(f"score: expected a domain with norm='pmi' and with no other, got norm={norm!r}.")
    masks = fills_masks(model)
    if one_by_one and not masks:
        raise ConfigError("score: one_by_one has no effect on a model without masks. Leave it out.")
    reader = _Reader(tokenizer, masked=masks, reads_apart=bool(inner_model(model).config.is_encoder_decoder))
    masking = Masking(reader.mask_id, one_by_one) if masks else None
    listed = _listed(candidates, len(context))
    scores_BC = _log_probabilities(model, context, listed, reader, masking)
    if domain is not None:
        wanted = list(dict.fromkeys(_key(each) for row in listed for each in row))
        known_K = _log_probabilities(model, [domain], [wanted], reader, masking)[0]
        place = {each: k for k, each in enumerate(wanted)}
        index_BC = torch.tensor([[place[_key(each)] for each in row] for row in listed])
        return scores_BC - known_K[index_BC.to(known_K.device)]
    size: Callable[[Text], int] = {
        "none": lambda _: 1,
        "tokens": lambda each: len(reader.candidate(each)),
        "bytes": reader.size,
    }[norm]
    return scores_BC / scores_BC.new_tensor([[float(size(each)) for each in row] for row in listed])


@final
@dataclass(frozen=True, init=False)
class _Reader:
    """Texts to ids."""

    backend: TokenBackend | None
    masked: bool
    reads_apart: bool
    mask_id: int

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, *, masked: bool, reads_apart: bool) -> None:
        mask_id = None if tokenizer is None else tokenizer.mask_token_id
        if masked and mask_id is None:
            raise ConfigError("score: a masked language model needs a tokenizer with a mask token.")
        object.__setattr__(self, "backend", None if tokenizer is None else TokenBackend(tokenizer))
        object.__setattr__(self, "masked", masked)
        object.__setattr__(self, "reads_apart", reads_apart)
        object.__setattr__(self, "mask_id", -1 if mask_id is None else int(mask_id))

    def context(self, text: Text) -> tuple[list[int], list[int]]:
        """Ids before and after the candidate."""
        ids = [int(one) for one in text] if not isinstance(text, str) else self._ids(text)
        if not self.masked:
            return ids, []
        if ids.count(self.mask_id) != 1:
            raise ConfigError(
                f"score: expected the mask token once in every context, got it {ids.count(self.mask_id)} "
                f"times in {text!r:.80}."
            )
        place = ids.index(self.mask_id)
        return ids[:place], ids[place + 1 :]

    def candidate(self, text: Text) -> list[int]:
        """Ids of a candidate, as they are after other text."""
        if not isinstance(text, str):
            return [int(one) for one in text]
        return self._encoded(text, starts=self.reads_apart) if text else []

    def size(self, text: Text) -> int:
        """UTF-8 bytes."""
        return len((text if isinstance(text, str) else self._backend().decode(list(text))).encode())

    def _ids(self, text: str) -> list[int]:
        backend = self._backend()
        ids = self._encoded(text, starts=True) if text else []
        ending = list(backend.ending_ids) if self.masked or self.reads_apart else []
        return [*backend.bos_ids, *ids, *ending]

    def _encoded(self, text: str, *, starts: bool) -> list[int]:
        return self._backend().encode([Piece(text, ((len(text), 1.0),), starts)])[0][0]

    def _backend(self) -> TokenBackend:
        if self.backend is None:
            raise ConfigError("score: texts need a tokenizer. Give tokenizer=, or ids.")
        return self.backend


def _log_probabilities(
    model: nn.Module,
    context: Sequence[Text],
    candidates: Sequence[Sequence[Text]],
    reader: _Reader,
    masking: Masking | None,
) -> Tensor:
    groups = []
    for text, row in zip(context, candidates, strict=True):
        before, after = reader.context(text)
        if not before:
            raise ShapeError("score: expected a token before every candidate, got an empty context.")
        listed = [reader.candidate(each) for each in row]
        if not all(listed):
            raise ShapeError(f"score: expected a token in every candidate, got {list(row)!r:.80}.")
        prefix = torch.tensor(before)
        groups.append(
            Group(
                prefix,
                torch.zeros(len(before)),
                tuple(torch.tensor([*ids, *after]) for ids in listed),
                tuple(torch.tensor([1.0] * len(ids) + [0.0] * len(after)) for ids in listed),
            )
        )
    device = next(model.parameters()).device
    scores: list[Tensor] = [torch.empty(0)] * len(groups)
    for members in pack([len(group) for group in groups], TOKENS):
        batch = collate([groups[k] for k in members]).to(device)
        scored = forward(model, batch, masking=masking)
        sums_C = scored.logprobs_N.new_zeros(batch.continuations)
        sums_C = sums_C.index_add(0, batch.owner_N, scored.logprobs_N)
        sizes = [len(groups[k].continuation_ids) for k in members]
        for k, row_C in zip(members, sums_C.split(sizes), strict=True):
            scores[k] = row_C
    return torch.stack(scores)


def _listed(candidates: Sequence[Text] | Sequence[Sequence[Text]], contexts: int) -> Sequence[Sequence[Text]]:
    """A row of candidates per context."""
    if not contexts or not candidates:
        raise ShapeError(
            f"score: expected contexts and candidates, got {contexts} contexts and {len(candidates)} "
            "candidates."
        )
    first = candidates[0]
    shared = isinstance(first, str) or (len(first) > 0 and isinstance(first[0], int))
    rows = [candidates] * contexts if shared else candidates
    rows = cast(Sequence[Sequence[Text]], rows)
    if len(rows) != contexts or len({len(row) for row in rows}) != 1:
        raise ShapeError(
            f"score: expected one list of candidates per context ({contexts}), all of one length, got "
            f"lengths {[len(row) for row in rows]}."
        )
    return rows


def _key(text: Text) -> Text:
    return text if isinstance(text, str) else tuple(text)
