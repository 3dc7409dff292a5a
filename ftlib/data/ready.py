"""Rows that are tokenised already, checked and taken as they are."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ftlib.data.examples import Example
from ftlib.data.groups import pairs, refuse_identical
from ftlib.data.overflow import Overflow, Weighted, fit
from ftlib.data.segments import Tokens
from ftlib.data.stops import last_trained
from ftlib.errors import ConfigError, DataError

__all__ = ["check_ready", "ready"]


def check_ready(train_on: Any, prompt_loss_weight: float, *, apart: bool) -> None:
    """Refuse options that need the text.

    Raises:
        ConfigError: as said.
    """
    if train_on not in ("completion", "weighted", "all") or prompt_loss_weight or apart:
        raise ConfigError(
            "Encoder: expected rows of token ids to bring their weights, got "
            f"train_on={train_on!r:.40} with prompt_loss_weight={prompt_loss_weight}"
            f"{' for an encoder-decoder' if apart else ''}. "
            'Use train_on="completion", or "all" for every token.'
        )


def ready(
    tokens: Tokens,
    source: str,
    *,
    everything: bool,
    max_length: int | None,
    overflow: Overflow,
    vocabulary: int,
    stop_ids: Collection[int],
) -> Example:
    """The example of one row.

    Args:
        tokens: ids and weights.
        source: where the row came from.
        everything: every token is learned.
        max_length: as in `Encoder`.
        overflow: likewise.
        vocabulary: ids below this are known.
        stop_ids: ids that end a turn.

    Raises:
        DataError: ``missing_column``: weights that nobody gave; ``empty_target``, ``too_long``,
            ``identical_answers``; ids that the tokenizer does not know.
    """
    unknown = [i for ids in (tokens.prompt, *tokens.answers) for i in ids if i >= vocabulary]
    if unknown:
        raise DataError(
            f"expected token ids below {vocabulary}, got {unknown[0]}. The row is of another tokenizer."
        )
    prefix, answers = _weighted(tokens, everything=everything)
    compared = pairs(len(answers), {})
    refuse_identical(answers, compared)
    fitted = fit(prefix, answers, max_length, overflow, bos=0)
    if fitted is None:
        return Example(prefix, answers, source, dropped="too_long")
    cut = fitted != (prefix, answers)
    if cut:
        refuse_identical(fitted[1], compared, max_length)
    prefix, answers = fitted
    trained = [sum(weight > 0 for weight in (prefix[1] + weights)[1:]) for _, weights in answers]
    if not all(trained):
        cause = f"the prompt alone fills max_length={max_length}" if cut else "every token weighs 0"
        raise DataError(f"expected a trained token, got none: {cause}.", code="empty_target")
    stops = all(_ends(prefix, answer) in stop_ids for answer in answers)
    notes = (*(["truncated"] if cut else []), *([] if stops else ["without_terminator"]))
    return Example(prefix, answers, source, trained=sum(trained), pairs=len(compared), notes=notes)


def _weighted(tokens: Tokens, *, everything: bool) -> tuple[Weighted, tuple[Weighted, ...]]:
    """The prompt, which weighs nothing, and the answers after it."""
    if len(tokens.answers) > 1:
        prompt = list(tokens.prompt)
        return (prompt, [0.0] * len(prompt)), tuple((list(ids), [1.0] * len(ids)) for ids in tokens.answers)
    ids = [*tokens.prompt, *tokens.answers[0]]
    if everything:
        return ([], []), ((ids, [1.0] * len(ids)),)
    if tokens.weights is None:
        raise DataError(
            "expected labels, completion_mask or assistant_masks beside input_ids, got none of them. Add "
            'one, or learn every token: train_on="all".',
            code="missing_column",
            column="labels",
        )
    weights = [*([0.0] * len(tokens.prompt)), *tokens.weights]
    start = next((k for k, weight in enumerate(weights) if weight > 0), len(weights))
    return (ids[:start], weights[:start]), ((ids[start:], weights[start:]),)


def _ends(prefix: Weighted, answer: Weighted) -> int | None:
    """The last trained token."""
    last = last_trained(prefix[1] + answer[1])
    return None if last is None else (prefix[0] + answer[0])[last]
