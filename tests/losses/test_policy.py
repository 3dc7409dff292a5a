"""PPO's clipped losses: hand values, gradients on either side of the clips, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ftlib.errors import ConfigError, ShapeError
from ftlib.losses import policy_ratio, ppo_policy, ppo_value

NAN = float("nan")
YES = torch.ones(1, 1, dtype=torch.bool)


def cell(value: float) -> Tensor:
    return torch.tensor([[value]])


def policy_loss(advantage: float, ratio: float, **options) -> float:
    return float(ppo_policy(cell(math.log(ratio)), cell(0.0), cell(advantage), YES, **options))


def policy_gradient(advantage: float, ratio: float, **options) -> float:
    """By the log-probability."""
    logprob = cell(math.log(ratio)).requires_grad_()
    loss = ppo_policy(logprob, cell(0.0), cell(advantage), YES, **options)
    return float(torch.autograd.grad(loss.sum(), logprob)[0])


# --- policy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "ratio", "options", "loss"),
    [
        (1.0, 1.5, {}, -1.2),
        (-1.0, 0.5, {}, 0.8),
        (-1.0, 5.0, {"dual": 3.0}, 3.0),
        (-1.0, 5.0, {}, 5.0),
        (1.0, 5.0, {"dual": 3.0}, -1.2),
        (-1.0, 2.0, {"dual": 3.0}, 2.0),
        (1.0, 0.5, {}, -0.5),
        (-1.0, 1.5, {}, 1.5),
        (1.0, 1.5, {"clip": (0.2, 0.28)}, -1.28),
        (-1.0, 0.5, {"clip": (0.3, 0.2)}, 0.7),
        (1.0, 1.5, {"clip": math.inf}, -1.5),
        (0.0, 1.5, {"dual": 3.0}, 0.0),
    ],
    ids=[
        "a good token is worth no more than 1 + clip",
        "a bad token costs no less than 1 - clip",
        "the dual clip bounds what a bad token costs",
        "which is unbounded without it",
        "and leaves good tokens alone",
        "and bad ones below it",
        "a good token made less likely is not clipped",
        "nor a bad one made likelier",
        "the upper side has its own width",
        "and so has the lower",
        "no clip",
        "no advantage, no loss",
    ],
)
def test_hand_values(advantage, ratio, options, loss):
    assert policy_loss(advantage, ratio, **options) == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("advantage", [2.0, -0.7])
def test_at_ratio_one_the_gradient_is_the_policy_gradient(advantage):
    """-A grad log pi, whatever clips and bounds are set."""
    assert policy_gradient(advantage, 1.0) == pytest.approx(-advantage)
    assert policy_gradient(advantage, 1.0, clip=(0.1, 0.3), dual=3.0) == pytest.approx(-advantage)


@pytest.mark.parametrize(
    ("advantage", "ratio", "options", "gradient"),
    [
        (1.0, 1.5, {}, 0.0),
        (-1.0, 0.5, {}, 0.0),
        (1.0, 0.5, {}, -0.5),
        (-1.0, 1.5, {}, 1.5),
        (1.0, 1.1, {}, -1.1),
        (-1.0, 5.0, {"dual": 3.0}, 0.0),
    ],
)
def test_nothing_pulls_beyond_the_clip_and_everything_pulls_back(advantage, ratio, options, gradient):
    assert policy_gradient(advantage, ratio, **options) == pytest.approx(gradient, rel=1e-6, abs=1e-12)


def test_importance_weights_scale_each_token_and_get_no_gradient():
    logprobs_BL = torch.tensor([[0.1, -0.1]], requires_grad=True)
    weights_BL = torch.tensor([[2.0, 0.5]], requires_grad=True)
    mask_BL, advantages_BL = torch.ones(1, 2, dtype=torch.bool), torch.ones(1, 2)
    plain_BL = ppo_policy(logprobs_BL, torch.zeros(1, 2), advantages_BL, mask_BL)
    weighted_BL = ppo_policy(logprobs_BL, torch.zeros(1, 2), advantages_BL, mask_BL, importance_BL=weights_BL)
    assert_close(weighted_BL, plain_BL * weights_BL.detach())
    weighted_BL.sum().backward()
    assert weights_BL.grad is None


def test_the_ratio_is_that_of_the_probabilities():
    now_BL, then_BL = torch.tensor([[0.3, NAN]]).log(), torch.tensor([[0.2, 0.5]]).log()
    ratio_BL = policy_ratio(now_BL, then_BL, torch.tensor([[True, False]]))
    assert_close(ratio_BL, torch.tensor([[1.5, 1.0]]))


@pytest.mark.parametrize("log_ratio", [1000.0, -1000.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_extreme_ratios_stay_finite_in_value_and_gradient(log_ratio, advantage):
    logprobs_BL = cell(log_ratio).requires_grad_()
    loss_BL = ppo_policy(logprobs_BL, cell(0.0), cell(advantage), YES)
    (gradient_BL,) = torch.autograd.grad(loss_BL.sum(), logprobs_BL)
    assert bool(loss_BL.isfinite().all())
    assert bool(gradient_BL.isfinite().all())
    limit = math.exp(math.copysign(20, log_ratio))
    assert_close(policy_ratio(cell(log_ratio), cell(0.0), YES), cell(limit))


@pytest.mark.parametrize("options", [{}, {"clip": (0.1, 0.3)}, {"dual": 3.0}])
def test_policy_gradients_are_those_of_finite_differences(options):
    """Log-ratios away from the kinks: log .8 = -.22, log 1.2 = .18, log 3 = 1.10, and the like."""
    log_ratio_BL = torch.tensor([[-0.7, -0.05, 0.05, 0.6, 1.6, 0.0]] * 2, dtype=torch.float64)
    old_BL = torch.linspace(-2, -1, 12, dtype=torch.float64).view(2, 6)
    advantages_BL = torch.tensor([[1.3], [-0.8]], dtype=torch.float64).expand(2, 6)
    mask_BL = torch.tensor([[True] * 5 + [False]] * 2)
    importance_BL = torch.linspace(0.5, 2, 12, dtype=torch.float64).view(2, 6)

    def loss(logprobs_BL: Tensor) -> Tensor:
        return ppo_policy(logprobs_BL, old_BL, advantages_BL, mask_BL, importance_BL=importance_BL, **options)

    assert torch.autograd.gradcheck(loss, (old_BL + log_ratio_BL).requires_grad_())


# --- value -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss"),
    [
        (0.9, 0.2, 1.0, 0.2, 0.18),
        (0.9, 0.2, 1.0, None, 0.005),
        (0.3, 0.2, 1.0, 0.2, 0.245),
        (-0.5, 0.2, 1.0, 0.2, 1.125),
        (0.9, NAN, 1.0, None, 0.005),
    ],
    ids=[
        "the clipped value .4 is worse: .6^2 / 2",
        "no clip: .1^2 / 2",
        "within the clip: .7^2 / 2",
        "moving away is not clipped: 1.5^2 / 2",
        "without a clip the old value counts not",
    ],
)
def test_value_hand_values(value, old, target, clip, loss):
    assert_close(ppo_value(cell(value), cell(old), cell(target), YES, clip=clip), cell(loss))


@pytest.mark.parametrize(("value", "gradient"), [(0.9, 0.0), (0.3, -0.7), (-0.5, -1.5)])
def test_a_value_is_pulled_towards_its_return_unless_the_clip_holds_it(value, gradient):
    """V_old = .2, R = 1, clip .2: V - R, or nothing."""
    values_BL = cell(value).requires_grad_()
    loss_BL = ppo_value(values_BL, cell(0.2), cell(1.0), YES, clip=0.2)
    (found,) = torch.autograd.grad(loss_BL.sum(), values_BL)
    assert_close(found, cell(gradient))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_gradients_are_those_of_finite_differences(clip):
    old_BL = torch.zeros(1, 6, dtype=torch.float64)
    values_BL = torch.tensor([[-0.9, -0.1, 0.1, 0.5, 1.4, 0.3]], dtype=torch.float64, requires_grad=True)
    returns_BL = torch.full((1, 6), 0.7, dtype=torch.float64)
    mask_BL = torch.tensor([[True] * 5 + [False]])
    assert torch.autograd.gradcheck(
        lambda values_BL: ppo_value(values_BL, old_BL, returns_BL, mask_BL, clip=clip), values_BL
    )


# --- precision and errors --------------------------------------------------------------------------


def test_low_precision_is_computed_in_float32():
    """In bfloat16 1 + .0039 is 1."""
    small = 2.0**-8
    low = ppo_policy(cell(small).bfloat16(), cell(0.0).bfloat16(), cell(1.0).bfloat16(), YES)
    assert_close(low, cell(-math.exp(small)))
    value = ppo_value(cell(small).bfloat16(), cell(0.0).bfloat16(), cell(1.0).bfloat16(), YES)
    assert_close(value, cell((1 - small) ** 2 / 2))


@pytest.mark.parametrize("clip", [0.0, -0.2, NAN, (0.2, 0.0), (-0.1, 0.2)])
def test_a_clip_that_leaves_no_room_is_refused(clip):
    with pytest.raises(ConfigError, match="ppo_policy: expected clip > 0"):
        policy_loss(1.0, 1.0, clip=clip)


@pytest.mark.parametrize("dual", [1.0, 0.5, NAN])
def test_a_dual_clip_that_would_cut_the_start_is_refused(dual):
    with pytest.raises(ConfigError, match="expected dual > 1, or None"):
        policy_loss(-1.0, 1.0, dual=dual)


@pytest.mark.parametrize("clip", [0.0, -0.2, NAN])
def test_a_value_clip_that_leaves_no_room_is_refused(clip):
    with pytest.raises(ConfigError, match="ppo_value: expected clip > 0, or None"):
        ppo_value(cell(0.0), cell(0.0), cell(0.0), YES, clip=clip)


def test_shapes_that_would_broadcast_are_refused():
    zeros_BL, mask_BL = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ShapeError, match=r"ppo_policy: .*advantages_BL \(2, 1\)"):
        ppo_policy(zeros_BL, zeros_BL, torch.zeros(2, 1), mask_BL)
    with pytest.raises(ShapeError, match=r"importance_BL \(3,\)"):
        ppo_policy(zeros_BL, zeros_BL, zeros_BL, mask_BL, importance_BL=torch.ones(3))
    with pytest.raises(ShapeError, match=r"policy_ratio: .*old_logprobs_BL \(3,\)"):
        policy_ratio(zeros_BL, torch.zeros(3), mask_BL)
    with pytest.raises(ShapeError, match=r"ppo_value: .*returns_BL \(2, 1\)"):
        ppo_value(zeros_BL, zeros_BL, torch.zeros(2, 1), mask_BL)
    with pytest.raises(ShapeError, match=r"True where a token counts, got torch\.float32"):
        ppo_value(zeros_BL, zeros_BL, zeros_BL, torch.ones(2, 3))
