"""Which tokens count: masks from lengths and stop ids, and sums under a mask.

A mask is bool and True means "counts". What lies under False has no influence: it is replaced by a
constant *before* the arithmetic, because a NaN times zero is a NaN, in values as in gradients.

Shapes: B rows, L positions of a padded row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ftlib.errors import ConfigError, ShapeError

__all__ = ["check_masked", "completion_mask", "masked", "reduce", "wide"]


def completion_mask(ids_BL: Tensor, lengths_B: Tensor, stop_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which tokens of sampled completions count, and which completions ended by themselves.

        mask_t = t < length  and  no stop id before t

    The stop token itself counts: it was sampled, so it has a log-probability, a KL term and an
    advantage. Padding is told by length and order, never by its id, so that it may equal a stop id.

    Args:
        ids_BL: tokens sampled after the prompt, int [B, L]; what follows a row's end is padding.
        lengths_B: tokens before the padding, int [B], 0 to L. Rows may be longer than their first
            stop id says; what follows that id does not count.
        stop_ids: ids that end a completion; empty where nothing does.

    Returns:
        mask, bool [B, L]; finished, bool [B], True where the last token that counts is a stop id, and
        everywhere without stop ids.

    Raises:
        ShapeError: ids that are no matrix of integers, or lengths that are no vector of B integers up
            to L.

    Example:
        >>> ids_BL, stop = torch.tensor([[5, 2, 2], [5, 6, 7]]), 2  # 2 pads the first row, too
        >>> completion_mask(ids_BL, torch.tensor([3, 3]), [stop])
        (tensor([[ True,  True, False],
                [ True,  True,  True]]), tensor([ True, False]))
    """
    integers = not any(x.is_floating_point() or x.dtype == torch.bool for x in (ids_BL, lengths_B))
    if ids_BL.ndim != 2 or lengths_B.shape != ids_BL.shape[:1] or not integers:
        raise ShapeError(
            f"completion_mask: expected integer ids [B, L] and lengths [B], got {_told(ids_BL)} and "
            f"{_told(lengths_B)}."
        )
    longest = ids_BL.shape[1]
    if bool(((lengths_B < 0) | (lengths_B > longest)).any()):
        raise ShapeError(
            f"completion_mask: expected lengths of 0 to {longest}, got {lengths_B.tolist()}. Count the "
            "tokens of the completion without its prompt."
        )
    within_BL = torch.arange(longest, device=ids_BL.device) < lengths_B[:, None]
    if not stop_ids:
        return within_BL, torch.ones_like(lengths_B, dtype=torch.bool)
    stops_BL = torch.isin(ids_BL, ids_BL.new_tensor(list(stop_ids))) & within_BL
    before_BL = stops_BL.cumsum(1) - stops_BL.long()  # stop ids before each position
    return within_BL & (before_BL == 0), stops_BL.any(1)


def reduce(
    x: Tensor, mask: Tensor, *, denom: Tensor | float, mode: Literal["token", "row"] = "token"
) -> Tensor:
    """A mean under a mask, over a denominator that the caller owns.

        token:  sum_bt m_bt x_bt / denom
        row:    sum_b (sum_t m_bt x_bt / sum_t m_bt) / denom

    The denominator is that of the whole optimiser step, summed over micro-batches and ranks: sampled
    tokens, or rows. Adding the results of the parts then gives the mean of the whole, however it was
    cut; a mean of means does not.

    Args:
        x: one value per token, float [B, L]; any shape for tokens.
        mask: bool, same shape.
        denom: scalar, tokens or rows; a tensor is not read, and zero gives zero.
        mode: whether each token or each row weighs the same. Rows of which nothing counts add zero.

    Returns:
        float32 (float64 for float64) scalar.

    Raises:
        ShapeError: shapes that differ, a mask that is not bool, rows that are not [B, L].
        ConfigError: a negative number as denominator, or an unknown mode.

    Example:
        >>> losses_BL = torch.tensor([[1.0, 1.0], [-1.0, 9.0]])
        >>> mask_BL = torch.tensor([[True, True], [True, False]])
        >>> reduce(losses_BL, mask_BL, denom=3)
        tensor(0.3333)
        >>> reduce(losses_BL, mask_BL, denom=2, mode="row")
        tensor(0.)
    """
    check_masked("reduce", mask, x=x)
    if mode not in ("token", "row"):
        raise ConfigError(f"reduce: expected the mode 'token' or 'row', got {mode!r}.")
    if not isinstance(denom, Tensor) and not denom >= 0:
        raise ConfigError(f"reduce: expected a denominator >= 0, got {denom}. Count tokens or rows.")
    sums = masked(x, mask)
    if mode == "row":
        if x.ndim != 2:
            raise ShapeError(f"reduce: expected rows [B, L] for the mode 'row', got {tuple(x.shape)}.")
        sums = sums.sum(1) / mask.sum(1).clamp(min=1)
    denominator = torch.as_tensor(denom, dtype=sums.dtype, device=sums.device)
    return sums.sum() / torch.where(denominator > 0, denominator, torch.ones_like(denominator))


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is that already: the precision losses are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` in at least float32 with zeros under mask False, through which no gradient flows."""
    x = wide(x)
    return torch.where(mask, x, torch.zeros_like(x))


def check_masked(where: str, mask: Tensor, *, matrix: bool = False, **tensors: Tensor) -> None:
    """Refuse tensors that would broadcast against their mask, and masks that are not bool.

    Args:
        where: the function that asks, for the message.
        mask: bool.
        matrix: whether all must be [B, L].
        tensors: by the name that the message gives them.

    Raises:
        ShapeError: naming every shape.
    """
    if mask.dtype != torch.bool:
        raise ShapeError(f"{where}: expected a bool mask, True where a token counts, got {mask.dtype}.")
    shapes = {tuple(x.shape) for x in (mask, *tensors.values())}
    if len(shapes) != 1 or (matrix and mask.ndim != 2):
        expected = "one shape [B, L]" if matrix else "one shape"
        got = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (*tensors.items(), ("mask", mask)))
        raise ShapeError(f"{where}: expected {expected} for all, got {got}.")


def _told(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"
