"""Several answers to one prompt as one group: what they begin with is stored once and weighs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, takewhile

from ftlib.data.overflow import Weighted
from ftlib.errors import DataError

__all__ = ["common", "pairs", "refuse_identical", "share"]

Ranks = Sequence[float]


def common(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all of these share.

    Example:
        >>> common([[1, 2, 3], [1, 2, 4, 5]])
        2
    """
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False)))


def share(
    sides: Sequence[tuple[Weighted | None, Weighted]], *, bos: int
) -> tuple[Weighted, tuple[Weighted, ...]]:
    """Answers that were encoded one by one, as a shared prefix and one continuation each.

    The prefix is the beginning that is equal token by token, up to where the first of the prompts ends;
    tokens of a prompt after that stay in the continuation, with the weight they had.

    Args:
        sides: prompt and rest of each answer; the prompt is `None` where nothing marks its end, and then
            all of the text may be shared.
        bos: leading tokens that are no prompt.

    Raises:
        DataError: ``prompts_differ``: nothing is shared.
    """
    wholes = [_joined(prompt or ([], []), rest) for prompt, rest in sides]
    prompts = [whole[0] if side[0] is None else side[0][0] for side, whole in zip(sides, wholes, strict=True)]
    shared = common(prompts)
    if shared <= bos < max(map(len, prompts)):
        raise DataError(
            "expected answers to one prompt, got texts without a common beginning. Remove the row, or give "
            "the prompt in a column of its own.",
            code="prompts_differ",
        )
    prefix = wholes[0][0][:shared], [0.0] * shared
    return prefix, tuple((ids[shared:], weights[shared:]) for ids, weights in wholes)


def pairs(count: int, extras: Mapping[str, Sequence[float]]) -> list[tuple[int, int]]:
    """The pairs of `count` answers of which one is better.

    Example:
        >>> pairs(3, {"rank": [1.0, 2.0, 2.0]})
        [(0, 1), (0, 2)]
    """
    ranks = extras.get("rank", range(count))
    return [(i, j) for i, j in combinations(range(count), 2) if ranks[i] != ranks[j]]


def refuse_identical(
    answers: Sequence[Weighted], compared: Sequence[tuple[int, int]], max_length: int | None = None
) -> None:
    """Refuse answers that are compared and have the same tokens.

    Raises:
        DataError: ``identical_answers``; with `max_length`, the cause is that they were cut to it.
    """
    for i, j in compared:
        if answers[i][0] == answers[j][0]:
            cause = "" if max_length is None else f" once cut to max_length={max_length}"
            raise DataError(
                f"expected answers that differ, got the same tokens in answers {i + 1} and {j + 1}{cause}. "
                "Remove the row: it compares nothing.",
                code="identical_answers",
            )


def _joined(prompt: Weighted, rest: Weighted) -> Weighted:
    return prompt[0] + rest[0], prompt[1] + rest[1]
