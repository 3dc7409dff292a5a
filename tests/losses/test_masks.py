"""Masks from lengths and stop ids, and means over a denominator the caller owns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ftlib.errors import ConfigError, ShapeError
from ftlib.losses import completion_mask, reduce

NAN = float("nan")
STOP, OTHER_STOP = 2, 9


def mask_of(text: str) -> Tensor:
    """'110 100' to a bool mask of two rows."""
    return torch.tensor([[letter == "1" for letter in row] for row in text.split()])


# --- completion_mask -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "length", "stops", "mask", "finished"),
    [
        ([5, 6, STOP], 3, [STOP], "111", True),
        ([5, STOP, 6], 3, [STOP], "110", True),
        ([5, STOP, STOP], 3, [STOP], "110", True),
        ([5, 6, 7], 3, [STOP], "111", False),
        ([5, OTHER_STOP, 7], 3, [STOP, OTHER_STOP], "110", True),
        ([STOP, STOP, STOP], 3, [STOP], "100", True),
        ([5, 6, STOP], 2, [STOP], "110", False),
        ([5, 6, 7], 2, [], "110", True),
        ([5, STOP, 7], 3, [], "111", True),
        ([STOP, STOP, STOP], 0, [STOP], "000", False),
    ],
    ids=[
        "the terminator counts",
        "nothing counts after it",
        "padding that equals the stop id does not count",
        "no terminator, not finished",
        "any of several stop ids",
        "at once",
        "a stop id in the padding finishes nothing",
        "without stop ids every row is finished",
        "and any id may be sampled",
        "nothing was sampled",
    ],
)
def test_a_completion_ends_with_its_first_stop_id(row, length, stops, mask, finished):
    mask_BL, finished_B = completion_mask(torch.tensor([row]), torch.tensor([length]), stops)
    assert mask_BL.dtype == finished_B.dtype == torch.bool
    assert torch.equal(mask_BL, mask_of(mask))
    assert finished_B.tolist() == [finished]


def test_rows_do_not_depend_on_each_other():
    ids_BL = torch.tensor([[5, STOP, 7], [5, 6, 7], [STOP, 0, 0]])
    lengths_B, order = torch.tensor([3, 3, 1]), torch.tensor([2, 0, 1])
    mask_BL, finished_B = completion_mask(ids_BL, lengths_B, [STOP])
    moved_BL, moved_B = completion_mask(ids_BL[order], lengths_B[order], [STOP])
    assert torch.equal(moved_BL, mask_BL[order])
    assert torch.equal(moved_B, finished_B[order])


@pytest.mark.parametrize("length", [-1, 4])
def test_a_length_the_row_cannot_have_is_refused(length):
    with pytest.raises(ShapeError, match=r"lengths of 0 to 3, got \[.*without its prompt"):
        completion_mask(torch.zeros(1, 3, dtype=torch.int64), torch.tensor([length]), [STOP])


@pytest.mark.parametrize(
    ("ids", "lengths"),
    [
        (torch.zeros(3, dtype=torch.int64), torch.tensor([3])),
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[3]])),
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([3])),
        (torch.zeros(1, 3), torch.tensor([3])),
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([3.0])),
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([True])),
    ],
)
def test_ids_and_lengths_that_do_not_fit_are_refused(ids, lengths):
    with pytest.raises(ShapeError, match=r"integer ids \[B, L\] and lengths \[B\], got"):
        completion_mask(ids, lengths, [STOP])


# --- reduce ----------------------------------------------------------------------------------------


def test_tokens_weigh_the_same_whatever_micro_batch_they_came_in():
    """Ten tokens of loss +1 and two of -1: (10 - 2) / 12. The mean of the two means would be 0."""
    ten, two = torch.ones(1, 10), -torch.ones(1, 2)
    parts = [reduce(each, torch.ones_like(each, dtype=torch.bool), denom=12) for each in (ten, two)]
    assert_close(sum(parts), torch.tensor(8 / 12))


def test_rows_weigh_the_same_whatever_their_length():
    """Row means 2 and -1 over two rows: 1/2."""
    losses_BL = torch.tensor([[1.0, 2.0, 3.0], [-1.0, NAN, NAN]])
    assert_close(reduce(losses_BL, mask_of("111 100"), denom=2, mode="row"), torch.tensor(0.5))


@pytest.mark.parametrize("mode", ["token", "row"])
@pytest.mark.parametrize("cut", [1, 2])
def test_the_parts_of_any_split_add_up_to_the_whole(mode, cut):
    losses_BL = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    mask_BL, denom = mask_of("1110 0100 1011"), torch.tensor(7.0)

    def part(rows):
        return reduce(losses_BL[rows], mask_BL[rows], denom=denom, mode=mode)

    assert_close(part(slice(cut)) + part(slice(cut, None)), part(slice(None)))


@pytest.mark.parametrize("mode", ["token", "row"])
@pytest.mark.parametrize("denom", [0, torch.tensor(0), torch.tensor(3.0)])
def test_nothing_that_counts_gives_a_zero_with_zero_gradient(mode, denom):
    losses_BL = torch.full((2, 2), NAN, requires_grad=True)
    value = reduce(losses_BL, mask_of("00 00"), denom=denom, mode=mode)
    value.backward()
    assert value == 0
    assert_close(losses_BL.grad, torch.zeros(2, 2))


def test_low_precision_is_summed_in_float32():
    """2048 + 1 is 2048 in float16."""
    losses_BL = torch.tensor([[2048.0, 1.0]], dtype=torch.float16)
    assert_close(reduce(losses_BL, mask_of("11"), denom=1), torch.tensor(2049.0))


def test_what_cannot_be_reduced_is_refused():
    with pytest.raises(ShapeError, match=r"x \(2, 3\), mask \(2, 1\)"):
        reduce(torch.zeros(2, 3), mask_of("1 1"), denom=1)
    with pytest.raises(ShapeError, match=r"bool mask, True where a token counts, got torch\.int64"):
        reduce(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.int64), denom=1)
    with pytest.raises(ShapeError, match=r"rows \[B, L\] for the mode 'row', got \(1, 1, 2\)"):
        reduce(torch.zeros(1, 1, 2), mask_of("11")[None], denom=1, mode="row")
    with pytest.raises(ConfigError, match="'token' or 'row', got 'sequence'"):
        reduce(torch.zeros(1, 1), mask_of("1"), denom=1, mode="sequence")
    for denom in (-1, NAN):
        with pytest.raises(ConfigError, match="denominator >= 0"):
            reduce(torch.zeros(1, 1), mask_of("1"), denom=denom)
