"""Examples longer than `max_length`: refused, left out, or cut at one end.

A group is cut as one: its prompt from the left once for all answers, or every answer from the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ftlib.errors import DataError

__all__ = ["Overflow", "Weighted", "fit"]

Overflow = Literal["error", "drop", "truncate_prompt", "truncate"]
Weighted = tuple[list[int], list[float]]  # ids and their weights


def fit(
    prefix: Weighted, answers: Sequence[Weighted], max_length: int | None, overflow: Overflow, *, bos: int
) -> tuple[Weighted, tuple[Weighted, ...]] | None:
    """The example with its prefix and longest continuation within `max_length`; `None` drops it.

    Args:
        prefix: ids and weights of the shared prompt.
        answers: ids and weights of each continuation.
        max_length: tokens of the prefix and any one continuation; `None` leaves length alone.
        overflow: what to do with a longer example.
        bos: leading prefix tokens that a cut from the left leaves in place.

    Raises:
        DataError: ``too_long``: the policy is ``"error"``, or the prompt is too short to give way.
    """
    ids, weights = prefix
    longest = max(len(answer_ids) for answer_ids, _ in answers)
    if max_length is None or len(ids) + longest <= max_length:
        return prefix, tuple(answers)
    if overflow == "drop":
        return None
    if overflow == "truncate":
        room = max(max_length - len(ids), 0)
        return _cut(prefix, max_length), tuple(_cut(answer, room) for answer in answers)
    excess = len(ids) + longest - max_length
    if overflow == "truncate_prompt" and len(ids) - bos >= excess:
        return (ids[:bos] + ids[bos + excess :], weights[:bos] + weights[bos + excess :]), tuple(answers)
    reason = (
        f"of which {longest} are not prompt"
        if overflow == "truncate_prompt"
        else 'choose overflow="drop", "truncate_prompt" or "truncate"'
    )
    raise DataError(
        f"expected at most {max_length} tokens, got {len(ids) + longest}; {reason}. "
        "Raise max_length or shorten the row.",
        code="too_long",
    )


def _cut(tokens: Weighted, length: int) -> Weighted:
    return tokens[0][:length], tokens[1][:length]
