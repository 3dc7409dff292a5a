"""The records that pass between phases: what they refuse, and sums that never become means of means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ftlib.batches import Group, LossOutput, Mean, Span
from ftlib.errors import ShapeError
from tests.packed import MIXED, random_batch


def ids(length: int) -> Tensor:
    return torch.arange(length)


def group(**changes: Any) -> Group:
    fields: dict[str, Any] = {
        "prefix_ids": ids(2),
        "prefix_weights": torch.zeros(2),
        "continuation_ids": (ids(3), ids(1)),
        "continuation_weights": (torch.ones(3), torch.ones(1)),
    }
    return Group(**(fields | changes))


def test_a_group_counts_its_prefix_once() -> None:
    assert len(group()) == 2 + 3 + 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"continuation_weights": (torch.ones(3),)}, "2 continuations and 1 weight vectors"),
        ({"continuation_ids": (), "continuation_weights": ()}, "got 0 continuations"),
        ({"prefix_weights": torch.zeros(3)}, r"got \(2,\) and \(3,\)"),
        ({"prefix_ids": ids(2)[None], "prefix_weights": torch.zeros(1, 2)}, r"got \(1, 2\)"),
        (
            {"continuation_ids": (ids(3), ids(0)), "continuation_weights": (torch.ones(3), ids(0))},
            "an empty one",
        ),
        ({"prefix_weights": torch.tensor([0.0, 0.5])}, "zero weights on a prefix shared"),
    ],
)
def test_a_group_that_does_not_fit_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        group(**changes)


def test_a_prefix_of_one_continuation_may_be_trained() -> None:
    weighted = group(
        prefix_weights=torch.ones(2), continuation_ids=(ids(3),), continuation_weights=(torch.ones(3),)
    )
    assert_close(weighted.prefix_weights, torch.ones(2))


def test_a_span_ends_where_the_next_begins() -> None:
    batch = random_batch()
    assert Span(4, 2, (3, 1)).stop == 4 + 2 + 3 + 1
    assert [span.start for span in batch.spans[1:]] == [span.stop for span in batch.spans[:-1]]
    assert batch.tokens == batch.spans[-1].stop
    assert batch.continuations == sum(len(lengths) for _, lengths in MIXED)


def test_moving_a_batch_keeps_everything_but_the_device() -> None:
    batch = random_batch()
    moved = batch.to("meta")
    assert moved.spans == batch.spans
    for name in ("ids_T", "positions_T", "rows_N", "targets_N", "weights_N", "owner_N"):
        ours, theirs = getattr(moved, name), getattr(batch, name)
        assert (ours.device.type, ours.shape, ours.dtype) == ("meta", theirs.shape, theirs.dtype)


def mean(total: float, count: float) -> Mean:
    return Mean(torch.tensor(total), torch.tensor(count))


def test_means_merge_by_their_halves() -> None:
    """(1 + 9) / (1 + 3), not the mean of 1 and 3."""
    assert_close((mean(1.0, 1.0) + mean(9.0, 3.0)).value, torch.tensor(2.5))


def test_the_mean_of_nothing_is_zero() -> None:
    assert_close(mean(0.0, 0.0).value, torch.tensor(0.0))


def test_detached_halves_carry_no_gradient() -> None:
    total = torch.tensor(1.0, requires_grad=True) * 2
    assert not Mean(total, torch.tensor(1.0)).detach().sum.requires_grad


def test_each_term_has_its_own_denominator() -> None:
    """6 / 3 + 8 / 16."""
    output = LossOutput({"policy": mean(6.0, 2.0), "value": mean(8.0, 4.0)})
    assert_close(output.loss({"policy": 3.0, "value": torch.tensor(16.0)}), torch.tensor(2.5))


def test_a_step_without_weight_costs_a_finite_zero() -> None:
    total = (torch.ones(3, requires_grad=True) * 0).sum()
    loss = LossOutput({"nll": Mean(total, torch.tensor(0.0))}).loss({"nll": 0.0})
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_a_term_without_a_count_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"missing \['value'\]"):
        LossOutput({"value": mean(1.0, 1.0)}).loss({"policy": 1.0})
