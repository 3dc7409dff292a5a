"""Whitening, explained variance and running moments, alone and over ranks."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ftlib.errors import NonFiniteError, ShapeError
from ftlib.losses import RunningMoments, explained_variance, whiten

NAN = float("nan")
ONE_TO_FOUR = torch.tensor([[1.0, 2.0, 3.0, 4.0]])


def all_true(like_BL: Tensor) -> Tensor:
    return torch.ones_like(like_BL, dtype=torch.bool)


def on_ranks(function, parts):
    """`function(part, reduce)` for every part at once, where `reduce` adds over them as ranks would."""
    barrier, posted = threading.Barrier(len(parts)), {}

    def rank(index):
        def reduce(sums: Tensor) -> Tensor:
            posted[index] = sums
            barrier.wait(timeout=30)
            total = torch.stack([posted[each] for each in range(len(parts))]).sum(0)
            barrier.wait(timeout=30)  # nobody posts anew before all have read
            return total

        return function(parts[index], reduce)

    with ThreadPoolExecutor(len(parts)) as pool:
        return list(pool.map(rank, range(len(parts))))


def sample(rows: int = 6, length: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_BL = torch.randn(rows, length, generator=generator) * 3 + 2
    return x_BL, torch.rand(rows, length, generator=generator) < 0.7


# --- whiten ----------------------------------------------------------------------------------------


def test_one_to_four():
    """Mean 5/2 and unbiased variance 5/3."""
    expected = torch.tensor([[-1.1619, -0.3873, 0.3873, 1.1619]])
    assert_close(whiten(ONE_TO_FOUR, all_true(ONE_TO_FOUR)), expected, rtol=0, atol=5e-5)
    assert_close(whiten(ONE_TO_FOUR, all_true(ONE_TO_FOUR), center=False), expected + 2.5, rtol=0, atol=5e-5)


def test_biased_variance_divides_by_n():
    """Variance 5/4: (4 - 5/2) / sqrt(5/4) = 3 / sqrt 5."""
    white_BL = whiten(ONE_TO_FOUR, all_true(ONE_TO_FOUR), unbiased=False)
    assert_close(white_BL[0, -1], torch.tensor(3 / 5**0.5))


def test_what_counts_ends_with_mean_zero_and_variance_one_and_the_rest_is_zero():
    x_BL, mask_BL = sample()
    white_BL = whiten(x_BL, mask_BL)
    assert_close(white_BL[mask_BL].mean(), torch.tensor(0.0), rtol=0, atol=1e-6)
    assert_close(white_BL[mask_BL].std(), torch.tensor(1.0))
    assert white_BL[~mask_BL].eq(0).all()
    assert_close(whiten(x_BL, mask_BL, center=False)[mask_BL].mean(), x_BL[mask_BL].mean())


@pytest.mark.parametrize("cut", [1, 3, 5])
@pytest.mark.parametrize("center", [True, False])
def test_ranks_together_whiten_as_one_would(cut, center):
    x_BL, mask_BL = sample()
    parts = [(x_BL[:cut], mask_BL[:cut]), (x_BL[cut:], mask_BL[cut:])]
    white = on_ranks(lambda part, reduce: whiten(*part, center=center, reduce=reduce), parts)
    assert_close(torch.cat(white), whiten(x_BL, mask_BL, center=center))


def test_a_rank_of_which_nothing_counts_changes_nothing_and_blocks_nobody():
    x_BL, mask_BL = sample()
    parts = [(x_BL, mask_BL), (torch.full((2, 5), NAN), torch.zeros(2, 5, dtype=torch.bool))]
    whole, nothing = on_ranks(lambda part, reduce: whiten(*part, reduce=reduce), parts)
    assert_close(whole, whiten(x_BL, mask_BL))
    assert nothing.eq(0).all()


@pytest.mark.parametrize("mask", [[[False, True]], [[False, False]]])
@pytest.mark.parametrize("options", [{}, {"center": False}, {"unbiased": False}])
def test_fewer_than_two_values_are_unchanged(mask, options):
    mask_BL = torch.tensor(mask)
    white_BL = whiten(torch.tensor([[NAN, 7.0]]), mask_BL, **options)
    assert_close(white_BL, torch.tensor([[0.0, 7.0]]) * mask_BL)


def test_two_ranks_of_one_value_each_have_two_values():
    """Values 1 and 3: mean 2, unbiased variance 2."""
    parts = [torch.tensor([[1.0]]), torch.tensor([[3.0]])]
    white = on_ranks(lambda x_BL, reduce: whiten(x_BL, all_true(x_BL), reduce=reduce), parts)
    assert_close(torch.cat(white), torch.tensor([[-1.0], [1.0]]) / 2**0.5)


def test_equal_values_whiten_to_zero():
    x_BL = torch.full((3, 7), 0.1)
    assert_close(whiten(x_BL, all_true(x_BL)), torch.zeros(3, 7), rtol=0, atol=1e-3)


def test_a_mean_far_above_the_deviation_costs_no_digits():
    """In float32 the mean of the squares minus the square of the mean would be zero here."""
    assert_close(
        whiten(ONE_TO_FOUR + 65536, all_true(ONE_TO_FOUR)), whiten(ONE_TO_FOUR, all_true(ONE_TO_FOUR))
    )


def test_the_gradient_of_whitening_is_that_of_finite_differences():
    x_BL, mask_BL = sample(2, 3)
    x_BL = x_BL.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: whiten(x, mask_BL), x_BL)


# --- explained_variance ----------------------------------------------------------------------------


def test_perfect_values_explain_all_and_a_constant_nothing():
    returns_BL, mask_BL = sample()
    assert_close(explained_variance(returns_BL, returns_BL, mask_BL), torch.tensor(1.0))
    assert_close(explained_variance(returns_BL + 5, returns_BL, mask_BL), torch.tensor(1.0))
    constant_BL = torch.full_like(returns_BL, 3.0)
    assert_close(explained_variance(constant_BL, returns_BL, mask_BL), torch.tensor(0.0), rtol=0, atol=1e-6)


def test_half_of_the_returns_explains_three_quarters_and_their_negative_minus_three():
    """Var(R/2) / Var(R) = 1/4; Var(2R) / Var(R) = 4."""
    returns_BL, mask_BL = sample()
    assert_close(explained_variance(returns_BL / 2, returns_BL, mask_BL), torch.tensor(0.75))
    assert_close(explained_variance(-returns_BL, returns_BL, mask_BL), torch.tensor(-3.0))


def test_the_exact_values_of_a_game_of_two_tokens_explain_its_share():
    """Four tokens, two draws a and b, R = (a + [a = b]) / 4; V_1 = 7/16 and V_2 = (a + 1/4) / 4.

    Var(R) = (5/4 + 3/16) / 16 = 23/256 in both columns. The residual of V_1 varies by all of it, that of
    V_2 by (3/16) / 16 = 3/256, and all residuals have mean zero: EV = 1 - (23 + 3) / (2 * 23) = 10/23.
    """
    a_B, b_B = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(1)
    returns_B = (a_B + (a_B == b_B)) / 4
    values_BL = torch.stack((torch.full((16,), 7 / 16), (a_B + 0.25) / 4), 1)
    value = explained_variance(values_BL, returns_B[:, None].expand(16, 2), all_true(values_BL))
    assert_close(value, torch.tensor(10 / 23))


@pytest.mark.parametrize("constant", [0.0, 0.1, 5.0])
def test_returns_that_do_not_vary_leave_nothing_to_explain(constant):
    values_BL, mask_BL = sample()
    assert explained_variance(values_BL, torch.full_like(values_BL, constant), mask_BL) == 0
    assert explained_variance(values_BL, values_BL, torch.zeros_like(mask_BL)) == 0


def test_ranks_together_explain_as_one_would():
    returns_BL, mask_BL = sample()
    values_BL = returns_BL * 0.3 + torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    parts = [(values_BL[rows], returns_BL[rows], mask_BL[rows]) for rows in (slice(2), slice(2, 6))]
    told = on_ranks(lambda part, reduce: explained_variance(*part, reduce=reduce), parts)
    assert_close(told, [explained_variance(values_BL, returns_BL, mask_BL)] * 2)


# --- RunningMoments --------------------------------------------------------------------------------


def moments_of(*batches: Tensor) -> RunningMoments:
    moments = RunningMoments()
    for batch in batches:
        moments.update(batch)
    return moments


@pytest.mark.parametrize("cuts", [[], [1], [1, 2, 9], [5, 5]])
def test_batches_of_any_size_give_the_moments_of_the_whole(cuts):
    x_B = sample(10, 3)[0].reshape(-1)
    moments = moments_of(*x_B.tensor_split(cuts))
    assert moments.count == 30
    assert moments.mean == pytest.approx(float(x_B.mean()), rel=1e-5)
    assert moments.std == pytest.approx(float(x_B.std()), rel=1e-5)


def test_scaling_divides_by_the_deviation_and_keeps_the_sign_of_every_score():
    """Of 1 and 3 the deviation is sqrt 2; subtracting the mean would turn a good score into a bad one."""
    moments = moments_of(torch.tensor([1.0, 3.0]))
    assert_close(moments.scale(torch.tensor([1.0, 3.0])), torch.tensor([1.0, 3.0]) / 2**0.5)


def test_only_what_counts_is_taken_in():
    moments = RunningMoments()
    moments.update(torch.tensor([1.0, NAN, 3.0]), torch.tensor([True, False, True]))
    assert (moments.count, moments.mean, moments.squares) == (2, 2, 2)


@pytest.mark.parametrize("batches", [[], [[]], [[4.0]], [[0.1] * 7, [0.1] * 3]])
def test_scores_are_unchanged_until_two_different_ones_were_seen(batches):
    moments = moments_of(*(torch.tensor(each) for each in batches))
    assert moments.std == 0
    assert_close(moments.scale(torch.tensor([0.1, 3.0])), torch.tensor([0.1, 3.0]))


def test_all_ranks_hold_the_moments_of_the_whole():
    x_BL, mask_BL = sample()

    def of(part, reduce):
        moments = RunningMoments()
        moments.update(*part, reduce=reduce)
        return moments.state_dict()

    states = on_ranks(of, [(x_BL[:2], mask_BL[:2]), (x_BL[2:], mask_BL[2:])])
    assert states[0] == states[1]
    whole = RunningMoments()
    whole.update(x_BL, mask_BL)
    assert states[0] == pytest.approx(whole.state_dict(), rel=1e-5)


def test_resumed_moments_go_on_as_the_uninterrupted_ones():
    first, second = sample(4, 3)[0].split(2)
    resumed = RunningMoments()
    resumed.load_state_dict(json.loads(json.dumps(moments_of(first).state_dict())))
    resumed.update(second)
    assert resumed.state_dict() == moments_of(first, second).state_dict()


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_score_that_is_no_number_is_refused_and_nothing_moves(bad):
    moments = moments_of(ONE_TO_FOUR)
    before = moments.state_dict()
    with pytest.raises(NonFiniteError, match="expected finite values"):
        moments.update(torch.tensor([1.0, bad]))
    assert moments.state_dict() == before


# --- precision and shapes --------------------------------------------------------------------------


def test_low_precision_is_computed_in_float32():
    x_BL, mask_BL = sample()
    low_BL = x_BL.bfloat16()
    assert_close(whiten(low_BL, mask_BL), whiten(low_BL.float(), mask_BL))
    assert explained_variance(low_BL, low_BL, mask_BL).dtype == torch.float32
    assert RunningMoments().scale(low_BL).dtype == torch.float32


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ShapeError, match=r"whiten: .*x_BL \(2, 3\), mask \(3,\)"):
        whiten(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"values_BL \(2, 3\), returns_BL \(2, 1\), mask \(2, 3\)"):
        explained_variance(torch.zeros(2, 3), torch.zeros(2, 1), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"RunningMoments.update: .*x \(3,\), mask \(1,\)"):
        RunningMoments().update(torch.zeros(3), torch.ones(1, dtype=torch.bool))
    with pytest.raises(ShapeError, match="bool mask"):
        whiten(torch.zeros(2), torch.ones(2))
