"""Preference losses: derived numbers, identities, gradients, extremes, and exact optima."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ftlib.errors import ConfigError, ShapeError
from ftlib.losses import bradley_terry, dpo, hinge, ipo, robust_dpo

BETA, NOISE = 0.1, 0.1
REFERENCE_LOSSES = [dpo, robust_dpo, hinge, ipo]
SMOOTH = [dpo, partial(dpo, label_smoothing=NOISE), robust_dpo, partial(robust_dpo, label_smoothing=0.3), ipo]
HUGE = 1e4


def of_h(loss: Callable[..., Tensor], h: Tensor | float, **options: float) -> Tensor:
    """The loss of pairs whose log-ratio is h, for beta 0.1 unless told."""
    h_B = torch.as_tensor(h, dtype=torch.float64).reshape(-1)
    zero_B = torch.zeros_like(h_B)
    return loss(h_B, zero_B, zero_B, zero_B, **({"beta": BETA} | options))


def random_four(rows: int = 5, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(4, rows, generator=generator, dtype=torch.float64) * 5)


def log1pexp(x: float) -> float:
    return math.log1p(math.exp(x))


# -- derived numbers -----------------------------------------------------------------------------


def test_a_lead_of_one_costs_log_of_1_plus_1_over_e() -> None:
    """R1: .3133."""
    assert_close(bradley_terry(torch.ones(1), torch.zeros(1)), torch.tensor([log1pexp(-1)]))
    assert log1pexp(-1) == pytest.approx(0.3133, abs=5e-5)


def test_a_margin_of_one_half_leaves_half_the_lead() -> None:
    """R1: .4741."""
    loss_B = bradley_terry(torch.ones(1), torch.zeros(1), margin_B=torch.tensor([0.5]))
    assert_close(loss_B, torch.tensor([log1pexp(-0.5)]))
    assert log1pexp(-0.5) == pytest.approx(0.4741, abs=5e-5)


def test_centring_adds_its_weight_times_the_squared_sum() -> None:
    """R1: .01 more. 0.01 (1 + 0)^2 = 0.01."""
    plain, centred = (bradley_terry(torch.ones(1), torch.zeros(1), center=c) for c in (0.0, 0.01))
    assert_close(centred - plain, torch.tensor([0.01]))


def test_a_soft_label_mixes_both_orders() -> None:
    """R1: p (log(1 + 1/e)) + (1 - p) log(1 + e), for a lead of one and p = 3/4."""
    loss_B = bradley_terry(torch.ones(1), torch.zeros(1), label_B=torch.tensor([0.75]))
    assert_close(loss_B, torch.tensor([0.75 * log1pexp(-1) + 0.25 * log1pexp(1)]))


def test_a_soft_label_is_met_where_the_lead_has_its_odds() -> None:
    """The slope of the loss in d is sigmoid(d) - p: zero at d = log(p / (1 - p))."""
    lead_B = torch.tensor([math.log(0.9 / 0.1)], dtype=torch.float64, requires_grad=True)
    zero_B = torch.zeros_like(lead_B)
    bradley_terry(lead_B, zero_B, label_B=torch.full_like(lead_B, 0.9)).sum().backward()
    assert_close(lead_B.grad, zero_B)


def test_a_soft_label_of_one_is_no_label() -> None:
    chosen_B, rejected_B, margin_B, _ = random_four()
    plain_B = bradley_terry(chosen_B, rejected_B, margin_B=margin_B)
    labelled_B = bradley_terry(chosen_B, rejected_B, margin_B=margin_B, label_B=torch.ones_like(margin_B))
    assert torch.equal(labelled_B, plain_B)


@pytest.mark.parametrize(
    ("loss", "noise", "at_0", "at_1"),
    [
        (dpo, 0.0, math.log(2), 0.6444),
        (dpo, NOISE, math.log(2), 0.6544),
        (robust_dpo, NOISE, math.log(2), 0.6319),
        (hinge, 0.0, 1.0, 0.9),
        (ipo, 0.0, 25.0, 16.0),
    ],
)
def test_values_at_a_tie_and_at_a_log_ratio_of_one(
    loss: Callable[..., Tensor], noise: float, at_0: float, at_1: float
) -> None:
    """D1."""
    values_B = of_h(loss, torch.tensor([0.0, 1.0]), label_smoothing=noise)
    assert_close(values_B, torch.tensor([at_0, at_1], dtype=torch.float64), rtol=0, atol=5e-5)


def test_each_side_is_measured_against_its_reference() -> None:
    """h = (-3 - -4) - (-7 - -5) = 1 + 2 = 3; -log sigmoid(0.3)."""
    loss_B = dpo(*(torch.tensor([x]) for x in (-3.0, -7.0, -4.0, -5.0)), beta=0.1)
    assert_close(loss_B, torch.tensor([log1pexp(-0.3)]))


# -- stationary points ---------------------------------------------------------------------------


def slope(loss: Callable[..., Tensor], h: float, **options: float) -> float:
    h_B = torch.tensor([h], dtype=torch.float64, requires_grad=True)
    (gradient_B,) = torch.autograd.grad(of_h(loss, h_B, **options).sum(), h_B)
    return float(gradient_B)


def test_where_each_loss_comes_to_rest() -> None:
    """D1."""
    assert slope(dpo, math.log(9) / BETA, label_smoothing=NOISE) == pytest.approx(0, abs=1e-12)  # 0.9 / 0.1
    assert slope(ipo, 1 / (2 * BETA)) == pytest.approx(0, abs=1e-12)
    assert slope(hinge, 1 / BETA + 1e-6) == 0
    assert slope(hinge, 1 / BETA - 1e-6) == pytest.approx(-BETA)
    assert slope(dpo, 1e3) < 0  # only at infinity


def test_slope_at_a_tie_is_minus_half_of_beta() -> None:
    """d/dh -log sigmoid(beta h) = -beta sigmoid(-beta h)."""
    assert slope(dpo, 0.0) == pytest.approx(-BETA / 2)


# -- identities ----------------------------------------------------------------------------------


def test_swapping_a_scored_pair_costs_exactly_the_lead() -> None:
    """softplus(d) - softplus(-d) = d."""
    chosen_B, rejected_B, *_ = random_four()
    swapped_B = bradley_terry(rejected_B, chosen_B)
    assert_close(swapped_B - bradley_terry(chosen_B, rejected_B), chosen_B - rejected_B)


def test_a_margin_equal_to_the_lead_is_a_tie() -> None:
    chosen_B, rejected_B, *_ = random_four()
    loss_B = bradley_terry(chosen_B, rejected_B, margin_B=chosen_B - rejected_B)
    assert_close(loss_B, torch.full_like(loss_B, math.log(2)))


def test_centring_alone_sees_the_level_of_the_scores() -> None:
    """A shift s of both scores leaves their difference, and adds center ((a + b + 2s)^2 - (a + b)^2)."""
    a, b, *_ = random_four()
    assert_close(bradley_terry(a + 3, b + 3), bradley_terry(a, b))
    shifted = bradley_terry(a + 3, b + 3, center=0.5) - bradley_terry(a, b, center=0.5)
    assert_close(shifted, 0.5 * ((a + b + 6) ** 2 - (a + b) ** 2))


def test_dpo_is_bradley_terry_on_implicit_rewards() -> None:
    chosen, rejected, ref_chosen, ref_rejected = random_four()
    rewards = BETA * (chosen - ref_chosen), BETA * (rejected - ref_rejected)
    assert_close(dpo(chosen, rejected, ref_chosen, ref_rejected, beta=BETA), bradley_terry(*rewards))


def test_a_policy_equal_to_its_reference_costs_log_2() -> None:
    chosen, rejected, *_ = random_four()
    loss_B = dpo(chosen, rejected, chosen, rejected, beta=BETA, label_smoothing=0.2)
    assert_close(loss_B, torch.full_like(loss_B, math.log(2)))


def test_conservative_dpo_is_the_expectation_over_swaps() -> None:
    h_B = torch.linspace(-30, 30, 7, dtype=torch.float64)
    expected_B = (1 - NOISE) * of_h(dpo, h_B) + NOISE * of_h(dpo, -h_B)
    assert_close(of_h(dpo, h_B, label_smoothing=NOISE), expected_B)


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.49])
def test_the_expectation_of_robust_dpo_over_swaps_is_dpo(noise: float) -> None:
    """D1."""
    h_B = torch.linspace(-30, 30, 7, dtype=torch.float64)
    expected_B = sum(
        share * of_h(robust_dpo, sign * h_B, label_smoothing=noise)
        for share, sign in ((1 - noise, 1), (noise, -1))
    )
    assert_close(expected_B, of_h(dpo, h_B))


def test_both_orders_of_a_hinge_sum_to_two_until_one_is_satisfied() -> None:
    """max(0, 1 - z) + max(0, 1 + z) = 2 for |z| <= 1, then 1 + |z|."""
    z_B = torch.tensor([-3.0, -1.0, -0.4, 0.0, 0.7, 2.0], dtype=torch.float64)
    both_B = of_h(hinge, z_B / BETA) + of_h(hinge, -z_B / BETA)
    assert_close(both_B, torch.maximum(torch.full_like(z_B, 2.0), 1 + z_B.abs()))


def test_both_orders_of_ipo_differ_by_four_times_the_target_times_h() -> None:
    """(h + t)^2 - (h - t)^2 = 4 h t, with t = 1 / (2 beta)."""
    h_B = torch.linspace(-9, 9, 7, dtype=torch.float64)
    assert_close(of_h(ipo, -h_B) - of_h(ipo, h_B), 4 * h_B / (2 * BETA))


@pytest.mark.parametrize("loss", REFERENCE_LOSSES)
def test_losses_see_the_log_ratio_alone(loss: Callable[..., Tensor]) -> None:
    """A shift of a completion under policy and reference alike changes nothing."""
    chosen, rejected, ref_chosen, ref_rejected = random_four()
    shifted = loss(chosen + 2, rejected - 5, ref_chosen + 2, ref_rejected - 5, beta=BETA)
    assert_close(shifted, loss(chosen, rejected, ref_chosen, ref_rejected, beta=BETA))


@pytest.mark.parametrize("loss", [*REFERENCE_LOSSES, bradley_terry])
def test_pairs_do_not_see_each_other(loss: Callable[..., Tensor]) -> None:
    """Reordering the pairs reorders the losses; one pair alone costs what it costs among others."""
    four = random_four()
    take, options = (2, {}) if loss is bradley_terry else (4, {"beta": BETA})
    order = torch.tensor([3, 0, 4, 1, 2])
    whole_B = loss(*four[:take], **options)
    assert torch.equal(loss(*(x[order] for x in four[:take]), **options), whole_B[order])
    assert torch.equal(loss(*(x[:1] for x in four[:take]), **options), whole_B[:1])


# -- gradients and extremes ----------------------------------------------------------------------


@pytest.mark.parametrize("loss", [*SMOOTH, hinge])
def test_gradients_are_those_of_finite_differences(loss: Callable[..., Tensor]) -> None:
    four = tuple(x.requires_grad_() for x in random_four())  # no pair lies on the hinge's corner
    assert torch.autograd.gradcheck(partial(loss, beta=BETA), four)


def test_gradients_of_bradley_terry_are_those_of_finite_differences() -> None:
    a, b, margin, _ = (x.requires_grad_() for x in random_four())
    assert torch.autograd.gradcheck(
        lambda a, b, margin: bradley_terry(a, b, margin_B=margin, center=0.3), (a, b, margin)
    )
    label = torch.full_like(a, 0.7)
    assert torch.autograd.gradcheck(lambda a, b: bradley_terry(a, b, label_B=label), (a, b))


@pytest.mark.parametrize("loss", [*SMOOTH, hinge, "bradley_terry"])
def test_extreme_inputs_stay_finite_in_value_and_gradient(loss: Callable[..., Tensor] | str) -> None:
    chosen_B = torch.tensor([HUGE, -HUGE, HUGE], requires_grad=True)
    rejected_B = torch.tensor([-HUGE, HUGE, HUGE], requires_grad=True)
    if isinstance(loss, str):
        loss_B = bradley_terry(chosen_B, rejected_B, margin_B=-rejected_B, center=0.1)
    else:
        loss_B = loss(chosen_B, rejected_B, -chosen_B.detach(), -rejected_B.detach(), beta=5.0)
    loss_B.sum().backward()
    assert bool(loss_B.isfinite().all())
    for scores_B in (chosen_B, rejected_B):
        assert scores_B.grad is not None
        assert bool(scores_B.grad.isfinite().all())


def test_a_hopeless_pair_costs_its_whole_deficit() -> None:
    """-log sigmoid(-x) = x for large x; the loss does not saturate where the sigmoid underflows."""
    loss_B = bradley_terry(torch.tensor([-HUGE]), torch.tensor([HUGE]))
    assert_close(loss_B, torch.tensor([2 * HUGE]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    four = tuple(x.to(dtype) for x in random_four())
    for loss in REFERENCE_LOSSES:
        value_B = loss(*four, beta=BETA)
        assert value_B.dtype == torch.float32
        assert torch.equal(value_B, loss(*(x.float() for x in four), beta=BETA))
    assert bradley_terry(four[0], four[1], margin_B=four[2]).dtype == torch.float32


def test_float64_is_kept_and_wins() -> None:
    a, b, c, d = random_four()
    assert dpo(a, b, c, d, beta=BETA).dtype == torch.float64
    assert dpo(a.float(), b.float(), c, d.float(), beta=BETA).dtype == torch.float64
    assert bradley_terry(a, b).dtype == torch.float64


def test_no_pairs_cost_nothing() -> None:
    empty = torch.zeros(0)
    assert dpo(empty, empty, empty, empty, beta=BETA).shape == (0,)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", REFERENCE_LOSSES)
def test_shapes_that_would_broadcast_are_refused(loss: Callable[..., Tensor]) -> None:
    two, column, one = torch.zeros(2), torch.zeros(2, 1), torch.zeros(1)
    with pytest.raises(ShapeError, match=rf"{loss.__name__}.*got \[\(2,\), \(2, 1\), \(2,\), \(2,\)\]"):
        loss(two, column, two, two, beta=BETA)
    with pytest.raises(ShapeError, match=r"\(1,\)"):
        loss(two, two, two, one, beta=BETA)
    with pytest.raises(ShapeError, match=r"\(2, 1\)"):
        loss(column, column, column, column, beta=BETA)


def test_scores_and_margins_of_other_shapes_are_refused() -> None:
    two = torch.zeros(2)
    with pytest.raises(ShapeError, match=r"got \[\(2,\), \(2, 1\), \(2,\)\]"):
        bradley_terry(two, torch.zeros(2, 1))
    with pytest.raises(ShapeError, match=r"got \[\(2,\), \(2,\), \(1,\)\]"):
        bradley_terry(two, two, margin_B=torch.zeros(1))


@pytest.mark.parametrize("loss", REFERENCE_LOSSES)
@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_a_beta_that_is_not_positive_is_refused(loss: Callable[..., Tensor], beta: float) -> None:
    with pytest.raises(ConfigError, match="beta > 0"):
        of_h(loss, 0.0, beta=beta)


@pytest.mark.parametrize("loss", REFERENCE_LOSSES)
@pytest.mark.parametrize("noise", [-0.1, 0.5, 1.0, math.nan])
def test_noise_outside_zero_to_one_half_is_refused(loss: Callable[..., Tensor], noise: float) -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing in \[0, 0.5\)"):
        of_h(loss, 0.0, label_smoothing=noise)


@pytest.mark.parametrize("loss", [hinge, ipo])
def test_noise_is_refused_where_it_has_no_meaning(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing=0, got 0\.1"):
        of_h(loss, 0.0, label_smoothing=0.1)


@pytest.mark.parametrize("center", [-0.1, math.inf, math.nan])
def test_a_center_below_zero_is_refused(center: float) -> None:
    with pytest.raises(ConfigError, match="center >= 0"):
        bradley_terry(torch.zeros(1), torch.zeros(1), center=center)


def test_ipo_alone_asks_for_means_per_token() -> None:
    assert ipo.reduction == "mean"  # type: ignore[attr-defined]
    assert not any(hasattr(loss, "reduction") for loss in (dpo, robust_dpo, hinge))


# -- exact optima: eight arms, true scores a/7, a uniform reference --------------------------------

ARMS = 8
TRUTH_A = torch.arange(ARMS, dtype=torch.float64) / (ARMS - 1)
FIRST, SECOND = (~torch.eye(ARMS, dtype=torch.bool)).nonzero().T  # all ordered pairs
SHARE_P = torch.sigmoid(TRUTH_A[FIRST] - TRUTH_A[SECOND])  # how often the first wins
UNIFORM_P = torch.full_like(SHARE_P, -math.log(ARMS))
STRENGTH = 0.2


def descended(loss_of: Callable[[Tensor], Tensor], rate: float, steps: int = 300) -> Tensor:
    """A table of eight numbers after plain gradient descent from zero."""
    table_A = torch.zeros(ARMS, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        (gradient_A,) = torch.autograd.grad((SHARE_P * loss_of(table_A)).sum(), table_A)
        assert gradient_A.shape == (ARMS,)
        table_A = (table_A - rate * gradient_A).detach().requires_grad_()
    assert float(gradient_A.norm()) < 1e-10
    return table_A.detach()


def policy_after(loss: Callable[..., Tensor], rate: float) -> Tensor:
    def loss_of(logits_A: Tensor) -> Tensor:
        logprobs_A = logits_A.log_softmax(0)
        return loss(logprobs_A[FIRST], logprobs_A[SECOND], UNIFORM_P, UNIFORM_P, beta=STRENGTH)

    return descended(loss_of, rate).softmax(0)


def test_a_reward_table_finds_the_true_differences() -> None:
    """R3: Bradley-Terry scores of eight arms, from all pairs."""
    table_A = descended(lambda scores_A: bradley_terry(scores_A[FIRST], scores_A[SECOND]), rate=0.5)
    assert_close(table_A.diff(), torch.full((ARMS - 1,), 1 / 7, dtype=torch.float64))


def test_dpo_finds_the_optimum_of_reward_less_kl() -> None:
    """D5: The policy proportional to reference * exp(score / beta)."""
    policy_A = policy_after(dpo, rate=10.0)
    assert_close(policy_A, (TRUTH_A / STRENGTH).softmax(0))
    published = [0.0035, 0.0070, 0.0144, 0.0294, 0.0601, 0.1227, 0.2507, 0.5121]
    assert policy_A.tolist() == pytest.approx(published, abs=5e-5)
    kl = float((policy_A * (policy_A * ARMS).log()).sum())
    assert float(policy_A @ TRUTH_A) - STRENGTH * kl == pytest.approx(0.7179, abs=5e-5)


def test_ipo_finds_the_least_squares_of_bounded_preferences() -> None:
    """D5: Of the targets (2p - 1) / (2 beta), summed over opponents and divided by the number of arms."""
    policy_A = policy_after(ipo, rate=1 / 32)
    target_AA = (2 * torch.sigmoid(TRUTH_A[:, None] - TRUTH_A[None]) - 1) / (2 * STRENGTH)
    assert_close(policy_A, (target_AA.sum(1) / ARMS).softmax(0))
    assert float(policy_A[-1]) == pytest.approx(0.2105, abs=5e-5)
    assert float(policy_A @ TRUTH_A) == pytest.approx(0.6246, abs=5e-5)
