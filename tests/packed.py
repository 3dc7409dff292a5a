"""Random packed batches of a stated shape, and the same groups one row at a time.

Shapes: T tokens, N scored rows, C continuations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ftlib.batches import Group, PackedBatch
from ftlib.data.collate import collate
from tests.models_zoo import VOCAB

__all__ = ["MIXED", "OwnLogits", "own_logprobs", "random_batch", "random_groups"]

Shape = tuple[int, tuple[int, ...]]  # tokens of the prefix, tokens of each continuation
# Plain text, a prompt with its completion, a pair, eight samples of one prompt; most outgrow the window of 8.
MIXED: tuple[Shape, ...] = ((0, (11,)), (5, (3,)), (13, (4, 9)), (1, (2, 1)), (3, (1, 2, 3, 4, 5, 6, 7, 12)))


def random_groups(shapes: Sequence[Shape] = MIXED, *, seed: int = 0) -> list[Group]:
    """Groups of random tokens; each continuation token weighs between 0 and 2."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> Tensor:
        return torch.randint(3, VOCAB, (length,), generator=generator)

    return [
        Group(
            prefix_ids=ids(prefix),
            prefix_weights=torch.zeros(prefix),
            continuation_ids=tuple(ids(length) for length in lengths),
            continuation_weights=tuple(2 * torch.rand(length, generator=generator) for length in lengths),
        )
        for prefix, lengths in shapes
    ]


def random_batch(shapes: Sequence[Shape] = MIXED, *, seed: int = 0) -> PackedBatch:
    """`random_groups`, collated with every predictable continuation token scored."""
    return collate(random_groups(shapes, seed=seed), score_all=True)


@dataclass(frozen=True, eq=False)
class OwnLogits:
    """What the model itself says, from a plain forward of one continuation at a time."""

    logprobs_N: Tensor
    last_CD: Tensor


def own_logprobs(model: PreTrainedModel, groups: Sequence[Group], *, temperature: float = 1.0) -> OwnLogits:
    """Log-probabilities of every predictable continuation token, in the order of `random_batch`."""
    logprobs, last = [], []
    for member in groups:
        for ids in member.continuation_ids:
            row_1L = torch.cat([member.prefix_ids, ids])[None]
            output = model(input_ids=row_1L, use_cache=False, output_hidden_states=True)
            logprobs_LV = (output.logits[0] / temperature).log_softmax(-1)
            first = max(len(member.prefix_ids), 1)
            rows = torch.arange(first - 1, row_1L.shape[1] - 1)
            logprobs.append(logprobs_LV[rows, row_1L[0, first:]])
            last.append(output.hidden_states[-1][0, -1])
    return OwnLogits(torch.cat(logprobs), torch.stack(last))
