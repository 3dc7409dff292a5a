"""Rows of token ids, which the encoder takes as they are.

`labels` are unshifted: the id itself where the token is learned, -100 elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ftlib.data.formats.rule import Converted, FormatOptions, Found, Slot, optional, slotted
from ftlib.data.problems import describe
from ftlib.errors import DataError

__all__ = ["MASKED_TOKENS", "TOKENISED", "TOKENISED_PAIR"]

_IGNORED = -100  # a label that is not learned


def _is_ids(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(_is_int, value))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(found: Found, _: FormatOptions) -> Converted:
    ids = _ids(found, "ids")
    kept = range(len(ids))
    if "attention_mask" in found:  # padding is no token
        there = _as_long(found, "attention_mask", ids)
        kept = [k for k in kept if there[k]]  # type: ignore[assignment]
    record: dict[str, Any] = {"input_ids": [ids[k] for k in kept]}
    weights = _weights(found, ids)
    if weights is None:
        return record
    record["labels"] = [ids[k] if weights[k] > 0 else _IGNORED for k in kept]
    if any(weights[k] not in (0.0, 1.0) for k in kept):
        record["loss_weights"] = [weights[k] for k in kept]
    return record


def _weights(found: Found, ids: list[int]) -> list[float] | None:
    """The loss weight of every token; `None` where the row does not say."""
    weights = None
    for slot in ("labels", "completion_mask", "assistant_masks", "loss_weights"):
        if slot not in found:
            continue
        given = _as_long(found, slot, ids)
        if slot == "labels":
            _check_labels(found, given, ids)
            given = [float(label != _IGNORED) for label in given]
        factors = [_weight(value, found.columns[slot]) for value in given]
        weights = factors if weights is None else [a * b for a, b in zip(weights, factors, strict=True)]
    return weights


def _check_labels(found: Found, labels: Sequence[Any], ids: list[int]) -> None:
    wrong = [k for k, (label, i) in enumerate(zip(labels, ids, strict=True)) if label not in (i, _IGNORED)]
    if wrong:
        k = wrong[0]
        shifted = k + 1 < len(ids) and labels[k] == ids[k + 1]
        hint = " They look shifted by one; ftlib wants them unshifted." if shifted else ""
        raise DataError(
            f"expected each label to be its own token id or {_IGNORED}, got {describe(labels[k])} for the id "
            f"{ids[k]} at position {k}.{hint}",
            column=found.columns["labels"],
        )


def _weight(value: Any, column: str) -> float:
    if not isinstance(value, bool | int | float) or not 0.0 <= value < math.inf:
        raise DataError(f"expected finite weights >= 0, got {describe(value)}.", column=column)
    return float(value)


def _as_long(found: Found, slot: str, ids: list[int]) -> Sequence[Any]:
    value = found[slot]
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(ids):
        size = f"a list of {len(value)}" if isinstance(value, Sequence) else describe(value)
        raise DataError(f"expected one value per token ({len(ids)}), got {size}.", column=found.columns[slot])
    return value


def _ids(found: Found, slot: str) -> list[int]:
    value = found[slot]
    if not _is_ids(value) or not value or min(value) < 0:
        raise DataError(
            f"expected a list of token ids >= 0, got {describe(value)}.",
            column=found.columns[slot],
            excerpt=describe(value),
        )
    return list(value)


def _pair(found: Found, _: FormatOptions) -> Converted:
    record = {f"{slot}_ids": _ids(found, slot) for slot in ("prompt", "chosen", "rejected")}
    if record["chosen_ids"] == record["rejected_ids"]:
        raise DataError(
            "expected answers that differ, got chosen_ids and rejected_ids equal. Remove the row: it "
            "compares nothing.",
            code="identical_answers",
            column=found.columns["rejected"],
        )
    return record


def _masked(found: Found, _: FormatOptions) -> Converted:
    ids = _ids(found, "tokens")
    masked = _as_long(found, "mask", ids)
    labels = [_IGNORED if hidden else i for i, hidden in zip(ids, masked, strict=True)]
    return {"input_ids": ids, "labels": labels}


TOKENISED = slotted(
    "tokenised",
    {
        "ids": Slot(("input_ids",), _is_ids),
        "labels": optional("labels"),
        "completion_mask": optional("completion_mask"),
        "assistant_masks": optional("assistant_masks"),
        "loss_weights": optional("loss_weights"),
        "attention_mask": optional("attention_mask"),
    },
    _whole,
    keys="input_ids",
    known_as="pre-tokenised",
    columns=("input_ids",),
    number=1,
    unless=lambda _: False,
)
TOKENISED_PAIR = slotted(
    "tokenised_pair",
    {name: Slot((f"{name}_ids",), _is_ids) for name in ("prompt", "chosen", "rejected")},
    _pair,
    keys="prompt_ids + chosen_ids + rejected_ids",
    known_as="pre-tokenised pairs",
    columns=("prompt_ids", "chosen_ids", "rejected_ids"),
    number=1,
    unless=lambda _: False,
)
MASKED_TOKENS = slotted(
    "masked_tokens",
    {"tokens": Slot(("tokens",), _is_ids), "mask": Slot(("mask",), lambda value: isinstance(value, list))},
    _masked,
    keys="tokens + mask (true = masked)",
    known_as="torchtune tokens",
    columns=("input_ids", "labels"),
)
