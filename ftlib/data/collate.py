"""Encoded examples to one `PackedBatch`: laid flat, no padding, only the scored rows named.

Shapes: T tokens of the batch, N scored rows, C continuations, P and L tokens of one prefix and one
continuation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ftlib.batches import Group, PackedBatch, Span
from ftlib.errors import ShapeError

__all__ = ["collate", "group"]

_FIELDS = ("prefix_ids", "prefix_weights", "continuation_ids", "continuation_weights")
_UNPREDICTED = -1  # no token stands before this one in its own sequence


def group(row: Mapping[str, Any]) -> Group:
    """One encoded row as a `Group`. Columns with one number, or one list of numbers, per continuation become
    extras, or extras of its tokens.

    Raises:
        ShapeError: the row lacks a column of encoded data, or an extra has another length.
    """
    if not isinstance(row, Mapping):
        raise ShapeError(f"collate: expected encoded rows, got {row!r:.80}. Encode records first.")
    missing = [name for name in _FIELDS if name not in row]
    if missing:
        raise ShapeError(
            f"collate: expected encoded rows, missing {missing} in {sorted(row)}. Encode them first."
        )
    continuations = row["continuation_ids"]
    extras, token_extras = {}, {}
    for name, value in row.items():
        if name in _FIELDS or not isinstance(value, (list, tuple, Tensor)):
            continue
        if len(value) != len(continuations):
            raise ShapeError(
                f"collate: expected one {name} per continuation ({len(continuations)}), got {len(value)}."
            )
        if isinstance(value[0], (list, Tensor)) and not (isinstance(value[0], Tensor) and value[0].ndim == 0):
            token_extras[name] = tuple(torch.as_tensor(vector, dtype=torch.float32) for vector in value)
        else:
            extras[name] = tuple(float(number) for number in value)
    return Group(
        prefix_ids=torch.as_tensor(row["prefix_ids"], dtype=torch.int64),
        prefix_weights=torch.as_tensor(row["prefix_weights"], dtype=torch.float32),
        continuation_ids=tuple(torch.as_tensor(ids, dtype=torch.int64) for ids in continuations),
        continuation_weights=tuple(
            torch.as_tensor(weights, dtype=torch.float32) for weights in row["continuation_weights"]
        ),
        extras=extras,
        token_extras=token_extras,
    )


def collate(examples: Sequence[Mapping[str, Any] | Group], *, score_all: bool = False) -> PackedBatch:
    """Lay encoded examples flat.

    A token is scored by the hidden state of the token before it in its own sequence: the last prefix
    token predicts the first token of every continuation. The first token of a sequence has none
    before it and is never scored.

    Args:
        examples: rows as the encoder gives them, or `Group`s; at least one.
        score_all: score every predictable continuation token, whatever its weight, for
            log-probabilities of whole continuations. Otherwise only tokens of weight > 0.

    Returns:
        The batch; extras are float32 [C].

    Raises:
        ShapeError: no examples, parts whose lengths differ, or extras that not every example has.
    """
    if not isinstance(examples, Iterable):
        raise ShapeError(f"collate: expected a list of encoded examples, got {examples!r:.80}.")
    groups = [example if isinstance(example, Group) else group(example) for example in examples]
    if not groups:
        raise ShapeError("collate: expected at least one example, got none.")
    for kind in ("extras", "token_extras"):
        names = sorted(getattr(groups[0], kind))
        for other in groups:
            if sorted(getattr(other, kind)) != names:
                raise ShapeError(
                    f"collate: expected the {kind} {names} in every example, got "
                    f"{sorted(getattr(other, kind))}."
                )

    ids, positions, scored = [], [], []
    spans: list[Span] = []
    start = owner = 0
    for member in groups:
        prefix, lengths = len(member.prefix_ids), tuple(map(len, member.continuation_ids))
        spans.append(Span(start, prefix, lengths))
        ids += [member.prefix_ids, *member.continuation_ids]
        positions += [torch.arange(prefix), *(torch.arange(prefix, prefix + n) for n in lengths)]
        scored += _scored(member, start, owner, score_all=score_all)
        start, owner = spans[-1].stop, owner + len(lengths)

    rows_N, targets_N, weights_N, owner_N = (torch.cat(column) for column in zip(*scored, strict=True))
    extras = {
        name: torch.tensor([value for member in groups for value in member.extras[name]], dtype=torch.float32)
        for name in groups[0].extras
    }
    token_extras = {
        name: torch.cat([_scored_extra(member, name, score_all=score_all) for member in groups])
        for name in groups[0].token_extras
    }
    return PackedBatch(
        torch.cat(ids),
        torch.cat(positions),
        tuple(spans),
        rows_N,
        targets_N,
        weights_N,
        owner_N,
        extras,
        token_extras,
    )


def _scored(
    member: Group, start: int, owner: int, *, score_all: bool
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(rows, targets, weights, owner) of the scored tokens, for the prefix and each continuation."""
    prefix = len(member.prefix_ids)
    before = start + prefix - 1 if prefix else _UNPREDICTED
    parts = [(member.prefix_ids, member.prefix_weights, start, _UNPREDICTED, owner)]
    offset = start + prefix
    for number, tokens_L in enumerate(member.continuation_ids):
        parts.append((tokens_L, member.continuation_weights[number], offset, before, owner + number))
        offset += len(tokens_L)
    scored = []
    for (tokens_L, weights_L, begin, predicts, whose), keep_L in zip(
        parts, _kept(member, score_all=score_all), strict=True
    ):
        rows_L = torch.arange(begin - 1, begin - 1 + len(tokens_L))
        rows_L[:1] = predicts
        rows_N = rows_L[keep_L]
        scored.append((rows_N, tokens_L[keep_L], weights_L[keep_L], torch.full_like(rows_N, whose)))
    return scored


def _kept(member: Group, *, score_all: bool) -> list[Tensor]:
    """Which tokens are scored, bool [L]: of the prefix, then of each continuation."""
    # The prefix carries weight only in groups of one continuation, whose loss it then joins.
    kept = [member.prefix_weights > 0]
    kept += [
        torch.ones_like(w, dtype=torch.bool) if score_all else w > 0 for w in member.continuation_weights
    ]
    kept[0][:1] = False  # nothing stands before the first token of a sequence
    if not len(member.prefix_ids):
        for keep_L in kept[1:]:
            keep_L[:1] = False
    return kept


def _scored_extra(member: Group, name: str, *, score_all: bool) -> Tensor:
    """One number per scored token of the group."""
    values = [torch.zeros(len(member.prefix_ids)), *member.token_extras[name]]
    kept = zip(values, _kept(member, score_all=score_all), strict=True)
    return torch.cat([values_L[keep_L] for values_L, keep_L in kept])
