"""Sampling from a transformers model in memory, on whatever device it is.

The model's own generation config is never read: neither its minimal length nor its penalties, which a
trainer could not work out again. Log-probabilities are those that `models.forward` gives at the same
temperature.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import groupby
from typing import cast, final

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, StopStringCriteria

from ftlib.adapters.attach import AnyModel, merge, model_capabilities
from ftlib.batches import Sampling
from ftlib.errors import CapabilityError, ConfigError, DataError, NonFiniteError
from ftlib.models.modes import evaluation_mode
from ftlib.models.parts import Plan, context_length, context_words, inner_model, make_plan, require_decoder
from ftlib.models.plan import plan_for
from ftlib.rollouts.decode import Completion, complete
from ftlib.rollouts.draw import uniforms
from ftlib.rollouts.sampler import Sampled, seeds_of

__all__ = ["TransformersSampler"]

logger = logging.getLogger(__name__)


@final
class TransformersSampler:
    """Draws completions with the model that is being trained.

    Args:
        model: a causal language model, plain or with an adapter.
        tokenizer: for stop strings; not needed without them.
        batch_size: rows decoded at once, >= 1. Changes speed and memory, in float32 not the result.
        merge: decode with a copy of the weights that has the adapter folded in, made anew after each
            `sync`. True costs a second set of weights and decodes faster; in half precision the copy
            rounds what the adapter added, so its log-probabilities are not quite the policy's. None
            merges where it is exact: float32 weights and an adapter that can be folded in.
        poll: called before every forward; an exception it raises ends the call, with the model as it was.

    Raises:
        CapabilityError: a model that `models.forward` does not take, one that writes nothing, or
            `merge=True` for an adapter that cannot be folded in.

    Example:
        >>> sampler = TransformersSampler(model)  # doctest: +SKIP
        >>> sampler.generate([[5, 6, 7]], Sampling(stop_ids=(2,), n=4), seed=0)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 64,
        merge: bool | None = None,
        poll: Callable[[], None] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"TransformersSampler: expected batch_size >= 1, got {batch_size}.")
        self._tokenizer, self._batch_size, self._merge = tokenizer, batch_size, merge
        self._poll = poll or _nothing
        self._stops: tuple[tuple[str, ...], Callable[[Tensor], Tensor]] | None = None
        self.sync(model, 0)

    def sync(self, policy: nn.Module, version: int) -> None:
        """See `Sampler.sync`. A merged copy is made at the next `generate`."""
        require_decoder(policy, "TransformersSampler")
        plan_for(policy).require_head(scores=False)
        self._policy, self._version = policy, version
        self._merges = _merges(policy, self._merge)
        self._copy: nn.Module | None = None

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, seed: int | Sequence[int]
    ) -> list[Sampled]:
        """See `Sampler.generate`.

        Raises:
            DataError: an empty prompt.
            ConfigError: a prompt that fills the model's context, a number of seeds that is not the
                number of prompts, or stop strings without a tokenizer.
            NonFiniteError: logits that are NaN; the prompts are named.
        """
        room = _room(self._policy, prompt_ids, sampling.max_new_tokens)
        seeds, stops = seeds_of(seed, len(prompt_ids)), self._stop_strings(sampling)
        decoder = self._decoder()
        drawn: list[list[Sampled]] = [[] for _ in prompt_ids]
        with evaluation_mode(decoder):
            plan = self._plan(decoder)
            alike = plan.virtual is not None and plan.virtual.unpadded(plan.body)
            for batch in _batches(prompt_ids, sampling.n, self._batch_size, alike=alike):
                streams_RN = [
                    uniforms(seeds[prompt], sample, sampling.max_new_tokens) for prompt, sample in batch
                ]
                distinct = list(dict.fromkeys(tuple(prompt_ids[prompt]) for prompt, _ in batch))
                place = {ids: index for index, ids in enumerate(distinct)}
                completions = complete(
                    plan,
                    distinct,
                    [place[tuple(prompt_ids[prompt])] for prompt, _ in batch],
                    torch.stack(streams_RN),
                    [room[prompt] for prompt, _ in batch],
                    sampling,
                    stops,
                    self._poll,
                )
                for (prompt, _), completion in zip(batch, completions, strict=True):
                    drawn[prompt].append(self._sampled(completion, prompt, sampling))
        return [each for row in drawn for each in row]

    def _sampled(self, completion: Completion, prompt: int, sampling: Sampling) -> Sampled:
        if not bool(completion.logprobs.isfinite().all()):
            raise NonFiniteError(
                f"generate: expected finite logits, got NaN for prompt {prompt + 1}. The weights hold NaN, "
                "or overflow in their dtype."
            )
        return Sampled.of(
            cast(Sequence[int], completion.ids),
            sampling,
            stop_string=completion.stop_string,
            logprobs=None if sampling.greedy else completion.logprobs,
            version=self._version,
        )

    def _decoder(self) -> nn.Module:
        """The model that decodes: the policy, or a copy of it with the adapter folded in."""
        if not self._merges:
            return self._policy
        if self._copy is None:
            self._copy = merge(cast(AnyModel, deepcopy(self._policy))).requires_grad_(False)
        return self._copy

    def _plan(self, decoder: nn.Module) -> Plan:
        """The policy was checked when it came; its copy computes the same."""
        return make_plan(decoder, "padded", "decoding")

    def _stop_strings(self, sampling: Sampling) -> Callable[[Tensor], Tensor] | None:
        """The matcher of transformers, kept for the same strings: it reads the whole vocabulary."""
        texts = sampling.stop_strings
        if not texts:
            return None
        if self._tokenizer is None:
            raise ConfigError(
                f"TransformersSampler: expected a tokenizer for stop strings {list(texts)}, got none. "
                "Give it one: TransformersSampler(model, tokenizer)."
            )
        if self._stops is None or self._stops[0] != texts:
            criterion = StopStringCriteria(self._tokenizer, list(texts))
            self._stops = texts, lambda ids_AN: cast(Tensor, criterion(ids_AN, None))
        return self._stops[1]


def _nothing() -> None:
    """Nothing to poll."""


def _merges(policy: nn.Module, asked: bool | None) -> bool:
    """Whether to decode with a merged copy."""
    capabilities = model_capabilities(cast(AnyModel, policy))
    adapted = policy is not inner_model(policy)
    if asked and not (adapted and capabilities.mergeable):
        raise CapabilityError(
            "TransformersSampler: expected an adapter that folds into the weights for merge=True, got "
            f"{'one that does not' if adapted else 'a plain model'}. Leave merge=None."
        )
    if asked is not None or not adapted:
        return bool(asked)
    exact = all(weight.dtype == torch.float32 for weight in policy.parameters())  # so not quantised either
    merges = capabilities.mergeable and exact
    logger.info("decoding with %s", "a merged float32 copy" if merges else "the adapter in place")
    return merges


def _room(policy: nn.Module, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[int]:
    """Tokens each prompt may add: as many as asked for, and no more than the model's context holds."""
    context = context_length(policy)
    room = []
    for row, prompt in enumerate(prompts, start=1):
        if len(prompt) == 0:
            raise DataError(
                "expected at least one token, got none. Start the prompt with the BOS token.",
                code="empty_prompt",
                file="<prompts>",
                row=row,
            )
        room.append(new_tokens if context is None else min(new_tokens, context - len(prompt)))
        if room[-1] < 1:
            raise ConfigError(
                f"generate: expected prompts shorter than the model's {context_words(policy)}, got "
                f"{len(prompt)} in prompt {row}. Shorten it."
            )
    return room


def _batches(
    prompts: Sequence[Sequence[int]], n: int, size: int, *, alike: bool
) -> Iterator[list[tuple[int, int]]]:
    """(prompt, sample) of the rows of each batch, the longest first; prompts of one length if `alike`."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    for _, equal in groupby(order, key=lambda index: len(prompts[index]) if alike else 0):
        rows = [(prompt, sample) for prompt in equal for sample in range(n)]
        for start in range(0, len(rows), size):
            yield rows[start : start + size]
