"""Which continuations are compared, how much each comparison weighs, and which one is the best."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ftlib.errors import ShapeError
from ftlib.objectives import pairs
from ftlib.objectives.pairs import best
from tests.objectives.answers import answers, batch_of, pair


def indices(found):
    return list(zip(found.chosen_P.tolist(), found.rejected_P.tolist(), strict=True))


def test_the_first_of_a_pair_is_the_chosen_one():
    found = pairs(batch_of(pair(), pair()))
    assert indices(found) == [(0, 1), (2, 3)]
    assert_close(found.weight_P, torch.ones(2))
    assert found.margin_P is None
    assert found.chosen_P.dtype == found.rejected_P.dtype == torch.int64


def test_without_ranks_the_order_is_the_rank():
    assert indices(pairs(batch_of(answers(1, 2, 3)))) == [(0, 1), (0, 2), (1, 2)]


def test_k_ranked_answers_are_k_choose_2_pairs_of_2_over_k_k_minus_1():
    k = 4
    found = pairs(batch_of(answers(2, 2, 2, 2, rank=[1, 2, 3, 4])))
    assert len(found.chosen_P) == k * (k - 1) / 2
    assert_close(found.weight_P, torch.full((6,), 2 / (k * (k - 1))))
    assert found.count == 1


def test_ranks_outrank_the_order():
    found = pairs(batch_of(answers(1, 2, 3, rank=[2, 3, 1]), pair(rank=[2, 1])))
    assert sorted(indices(found)) == [(0, 1), (2, 0), (2, 1), (4, 3)]


def test_ties_are_no_pairs_and_the_rest_share_the_weight_of_the_group():
    found = pairs(batch_of(answers(1, 2, 3, rank=[1, 1, 3])))
    assert indices(found) == [(0, 2), (1, 2)]
    assert_close(found.weight_P, torch.tensor([0.5, 0.5]))


def test_groups_are_not_compared_and_each_weighs_one():
    batch = batch_of(pair(), answers(1, 2, 3), pair())
    found = pairs(batch)
    group_C = torch.tensor([0, 0, 1, 1, 1, 2, 2])
    assert torch.equal(group_C[found.chosen_P], group_C[found.rejected_P])
    weight_G = torch.zeros(3).index_add(0, group_C[found.chosen_P], found.weight_P)
    assert_close(weight_G, torch.ones(3))
    assert found.count == 3


def test_the_margin_of_a_pair_is_the_difference_of_its_sides():
    found = pairs(batch_of(pair(margin=[0.5, 0.0]), pair(margin=[3.0, 1.0])))
    assert_close(found.margin_P, torch.tensor([0.5, 2.0]))


def test_a_mean_over_pairs_is_the_mean_over_groups_of_their_means():
    """Groups of means 7 and (1 + 2 + 6) / 3 = 3: their mean is 5."""
    found = pairs(batch_of(pair(), answers(1, 1, 1)))
    assert_close(found.mean(torch.tensor([7.0, 1.0, 2.0, 6.0])).value, torch.tensor(5.0))


def test_a_group_without_loss_weights_weighs_nothing():
    found = pairs(batch_of(pair(), answers(3, 2, weight=0.0)))
    assert_close(found.weight_P, torch.tensor([1.0, 0.0]))
    assert found.count == 1


@pytest.mark.parametrize("lonely", [answers(3, rank=[1]), answers(3, 2, rank=[1, 1])])
def test_a_group_without_a_pair_is_refused(lonely):
    with pytest.raises(ShapeError, match=r"ranks \[.*\] in group 1\. Give a chosen and a rejected"):
        pairs(batch_of(pair(rank=[1, 2]), lonely))


@pytest.mark.parametrize("name", ["rank", "margin"])
def test_extras_of_another_length_are_refused(name):
    batch = replace(batch_of(pair()), extras={name: torch.zeros(3)})
    with pytest.raises(ShapeError, match=rf"extras '{name}'.*\[2\], got \(3,\)"):
        pairs(batch)


def test_the_best_is_the_first_of_the_lowest_rank():
    ranked = [answers(1, 2, 3, rank=[3, 1, 1]), pair(rank=[2, 1]), answers(4, rank=[1])]
    assert best(batch_of(*ranked)).tolist() == [1, 4, 5]
    assert best(batch_of(answers(1, 2, 3), pair())).tolist() == [0, 3]
