"""What the matrix trains on: encoded examples, drawn once."""

from __future__ import annotations

from typing import Any

import torch

from tests.encoders import TEXTS, encoder_tokenizer
from tests.models_zoo import EOS, VOCAB

__all__ = ["CLASSES", "CLOZES", "MEMORY", "PAIRS", "PROMPTS"]

generator = torch.Generator().manual_seed(0)


def _ids(count: int) -> list[int]:
    found: list[int] = torch.randint(7, VOCAB, (count,), generator=generator).tolist()
    return found


def _example(index: int, prefix: list[int], answers: list[list[int]], **more: Any) -> dict[str, Any]:
    return {
        "prefix_ids": prefix,
        "prefix_weights": [0.0] * len(prefix),
        "continuation_ids": answers,
        "continuation_weights": [[1.0] * len(answer) for answer in answers],
        "length": len(prefix) + sum(map(len, answers)),
        "source": f"rows:{index + 1}",
        **more,
    }


# eight rows of eight tokens, the last four of which are trained
MEMORY = [_example(index, _ids(4), [_ids(4)]) for index in range(8)]
# sixteen pairs of uneven lengths that the last token but one tells apart
PAIRS = [
    _example(index, _ids(2 + 3 * index % 7), [[*_ids(1 + index % 4), token, EOS] for token in (11, 12)])
    for index in range(16)
]
# texts of three classes
CLASSES = [
    _example(index, [], [ids], label=[label])
    for index, (ids, label) in enumerate(
        zip(encoder_tokenizer()(TEXTS).input_ids, (0, 1, 2, 2, 1, 2, 0, 2), strict=True)
    )
]
# prompts of 1 to 7 tokens
PROMPTS = [{"prefix_ids": _ids(1 + 3 * index % 7), "source": f"prompts:{index + 1}"} for index in range(4)]
# questions with three words to choose from
CLOZES = [
    _example(
        index,
        _ids(2 + index % 4),
        [[11], [12], [13]],
        rank=[1.0 if word == index % 3 else 2.0 for word in range(3)],
        bytes=[1.0] * 3,
        **{"class": [0.0, 1.0, 2.0]},
    )
    for index in range(6)
]
