"""KL estimators: values, gradients in the mean, and what training with each ends at."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ftlib.errors import ConfigError, ShapeError
from ftlib.losses import check_kl_placement, kl_estimate, kl_exact, policy_ratio

INF, NAN = float("inf"), float("nan")
KINDS = ["abs", "k1", "k2", "k3", "k3_plus"]


def random_logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("k1", 0.5),
        ("k2", 0.125),
        ("k3", math.exp(-0.5) - 1 + 0.5),
        ("k3_plus", math.exp(-0.5) - 1 + 0.5),
        ("abs", 0.5),
    ],
)
def test_a_token_likelier_by_half_a_nat(kind, value):
    assert_close(kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.5]), kind=kind), torch.tensor([value]))


def test_a_token_less_likely_by_half_a_nat_shows_the_signs():
    less, more = torch.tensor([-1.5]), torch.tensor([-1.0])
    assert_close(kl_estimate(less, more, kind="k1"), torch.tensor([-0.5]))
    assert_close(kl_estimate(less, more, kind="abs"), torch.tensor([0.5]))
    assert_close(kl_estimate(less, more, kind="k3"), torch.tensor([math.exp(0.5) - 1 - 0.5]))


@pytest.mark.parametrize("kind", ["k1", "k3", "k3_plus"])
def test_k1_and_k3_have_the_exact_kl_as_their_mean(kind):
    logp_V, logq_V = random_logits(0, 6).log_softmax(0), random_logits(1, 6).log_softmax(0)
    mean = (logp_V.exp() * kl_estimate(logp_V, logq_V, kind=kind)).sum()
    assert_close(mean, kl_exact(logp_V, logq_V))


def test_exact_kl_of_a_fair_and_a_loaded_coin():
    """1/2 log(2/3) + 1/2 log 2 = log(4/3) / 2."""
    fair, loaded = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    assert_close(kl_exact(fair, loaded), torch.tensor(math.log(4 / 3) / 2))


def test_exact_kl_sums_the_last_axis_and_ignores_a_shift_of_the_logits():
    logits, ref_logits = random_logits(0, 2, 3, 5), random_logits(1, 2, 3, 5)
    value = kl_exact(logits, ref_logits)
    assert value.shape == (2, 3)
    assert bool((value > 0).all())
    assert_close(kl_exact(logits + 3, ref_logits - 1), value)
    assert_close(kl_exact(logits, logits), torch.zeros(2, 3, dtype=torch.float64))


def test_tokens_impossible_for_the_policy_add_nothing_to_the_exact_kl():
    """Uniform over two against uniform over three: log 3/2; against itself: 0. The reverse is infinite."""
    two, three = torch.tensor([0.0, 0.0, -INF], requires_grad=True), torch.zeros(3)
    value = kl_exact(two, three)
    value.backward()
    assert_close(value.detach(), torch.tensor(math.log(3 / 2)))
    assert_close(two.grad, torch.zeros(3))
    assert_close(kl_exact(two.detach(), two.detach()), torch.tensor(0.0))
    assert kl_exact(three, two.detach()) == INF


# --- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["abs", "k1", "k2", "k3"])
def test_gradients_are_those_of_finite_differences(kind):
    logprobs_BL = torch.tensor([[-0.5, -2.0], [-1.5, -0.1]], dtype=torch.float64, requires_grad=True)
    ref_BL = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    mask_BL = torch.tensor([[True, True], [True, False]])
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, ref_BL, kind=kind, mask=mask_BL), logprobs_BL)


def test_the_gradient_of_the_exact_kl_is_that_of_finite_differences():
    logits, ref_logits = random_logits(0, 2, 5).requires_grad_(), random_logits(1, 2, 5)
    assert torch.autograd.gradcheck(lambda x: kl_exact(x, ref_logits), logits)


def test_k3_plus_has_the_gradient_of_k2():
    logprobs_L = torch.tensor([-0.5, -2.0, -1.0], requires_grad=True)
    ref_L = torch.full((3,), -1.0)
    (gradient,) = torch.autograd.grad(kl_estimate(logprobs_L, ref_L, kind="k3_plus").sum(), logprobs_L)
    assert_close(gradient, (logprobs_L - ref_L).detach())


def mean_gradient(kind: str, *, sampled_from: Tensor | None = None) -> Tensor:
    """Gradient by the logits of the mean of an estimator over tokens; exact, by enumeration."""
    logits_V = random_logits(0, 6).requires_grad_()
    logp_V, logq_V = logits_V.log_softmax(0), random_logits(1, 6).log_softmax(0)
    estimate_V = kl_estimate(logp_V, logq_V, kind=kind)
    old_V = logp_V.detach() if sampled_from is None else sampled_from
    ratio_V = policy_ratio(logp_V, old_V, torch.ones(6, dtype=torch.bool)).detach()
    return torch.autograd.grad((old_V.exp() * ratio_V * estimate_V).sum(), logits_V)[0]


def gradient_of_kl(*, reverse: bool) -> Tensor:
    logits_V = random_logits(0, 6).requires_grad_()
    ref_V = random_logits(1, 6)
    value = kl_exact(ref_V, logits_V) if reverse else kl_exact(logits_V, ref_V)
    return torch.autograd.grad(value, logits_V)[0]


def test_in_the_loss_k2_descends_the_kl_k3_its_reverse_and_k1_nothing():
    assert_close(mean_gradient("k2"), gradient_of_kl(reverse=False))
    assert_close(mean_gradient("k3_plus"), gradient_of_kl(reverse=False))
    assert_close(mean_gradient("k3"), gradient_of_kl(reverse=True))
    assert_close(mean_gradient("k1"), torch.zeros(6, dtype=torch.float64))


def test_tokens_of_an_older_policy_give_the_same_gradient_with_the_ratio_as_factor():
    older_V = random_logits(2, 6).log_softmax(0)
    assert_close(mean_gradient("k2", sampled_from=older_V), gradient_of_kl(reverse=False))


# --- where each may stand --------------------------------------------------------------------------

# One token of eight, the score rising from 0 to 1, reference uniform. Then pi* is proportional to
# exp(score / beta), and the best of E[score] - beta KL is beta log mean(exp(score / beta)).
TOKENS, BETA, RATE, STEPS = 8, 0.2, 0.05, 200
SCORES_V = torch.arange(TOKENS, dtype=torch.float64) / (TOKENS - 1)
REF_V = torch.full((TOKENS,), 1 / TOKENS, dtype=torch.float64).log()
OPTIMUM = float(BETA * ((SCORES_V / BETA).logsumexp(0) - math.log(TOKENS)))


def objective_after_training(kind: str, place: str) -> float:
    """E[score] - beta KL after ascent with exact gradients, the penalty in the reward or in the loss."""
    logits_V = torch.zeros(TOKENS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits_V], RATE, maximize=True)
    for _ in range(STEPS):
        logp_V = logits_V.log_softmax(0)
        p_V = logp_V.exp()
        exact = kind == "exact"
        kl_V = kl_exact(logits_V, REF_V).expand(TOKENS) if exact else kl_estimate(logp_V, REF_V, kind=kind)
        if place == "reward":
            gain = (p_V * (SCORES_V - BETA * kl_V.detach())).sum()
        else:
            gain = (p_V * SCORES_V).sum() - BETA * (p_V.detach() * kl_V).sum()
        optimizer.zero_grad()
        gain.backward()
        optimizer.step()
    with torch.no_grad():
        return float((logits_V.softmax(0) * SCORES_V).sum() - BETA * kl_exact(logits_V, REF_V))


def test_the_optimum_is_the_known_one():
    assert pytest.approx(0.7179, abs=5e-5) == OPTIMUM


@pytest.mark.parametrize(
    ("kind", "place"),
    [("k1", "reward"), ("exact", "loss"), ("k2", "loss"), ("k3_plus", "loss")],
)
def test_what_is_allowed_trains_to_the_optimum(kind, place):
    check_kl_placement(kind, place)
    assert objective_after_training(kind, place) == pytest.approx(OPTIMUM, abs=5e-4)


@pytest.mark.parametrize(
    ("kind", "place", "why"),
    [
        ("k2", "reward", "does not grow .* everywhere, so rare tokens are pushed towards zero"),
        ("abs", "reward", "rare tokens are pushed towards zero"),
        ("k3", "reward", "rare tokens are pushed towards zero"),
        ("k3_plus", "reward", "rare tokens are pushed towards zero"),
        ("exact", "reward", "the same for every token .* no gradient"),
        ("k3", "loss", r"that of KL\(reference \|\| policy\)"),
        ("k1", "loss", "its mean gradient is zero"),
        ("abs", "loss", "that of no KL"),
    ],
)
def test_what_is_refused_does_not_and_the_error_says_why_and_what_fits(kind, place, why):
    fitting = {"reward": "'k1'", "loss": "'k2', 'k3_plus', 'exact'"}[place]
    with pytest.raises(ConfigError, match=f"KL '{kind}' in the {place}: .*{why}.* Use {fitting}."):
        check_kl_placement(kind, place)
    assert objective_after_training(kind, place) < OPTIMUM - 0.02


def test_unknown_kinds_and_places_are_refused():
    with pytest.raises(ConfigError, match="'reward' or 'loss', got 'both'"):
        check_kl_placement("k1", "both")
    with pytest.raises(ConfigError, match=r"expected a kind among .*'exact'.*, got 'k4'"):
        check_kl_placement("k4", "loss")
    with pytest.raises(ConfigError, match=r"expected a kind among .*'k3_plus'.*, got 'k4'"):
        kl_estimate(torch.zeros(1), torch.zeros(1), kind="k4")
    with pytest.raises(ConfigError, match=r"got 'exact'\. kl_exact takes whole distributions"):
        kl_estimate(torch.zeros(1), torch.zeros(1), kind="exact")


# --- precision, extremes, shapes -------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_log_ratios_stay_finite_in_value_and_gradient(kind):
    logprobs_L = torch.tensor([-1000.0, -1e-4, -30.0], dtype=torch.bfloat16, requires_grad=True)
    value_L = kl_estimate(logprobs_L, torch.tensor([-1e-4, -1000.0, -1.0]), kind=kind)
    value_L.sum().backward()
    assert value_L.dtype == torch.float32
    assert bool(value_L.isfinite().all())
    assert bool(logprobs_L.grad.isfinite().all())


def test_k3_keeps_its_digits_near_zero():
    """l^2/2 - l^3/6 for small l, where e^-l - 1 would leave nothing of float32."""
    small = 1e-3
    value = kl_estimate(torch.tensor([small]), torch.zeros(1), kind="k3")
    assert_close(value, torch.tensor([small**2 / 2 - small**3 / 6]), rtol=1e-3, atol=0)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ShapeError, match=r"logprobs \(2, 3\), ref_logprobs \(3,\)"):
        kl_estimate(torch.zeros(2, 3), torch.zeros(3), kind="k1")
    with pytest.raises(ShapeError, match=r"mask \(3,\)"):
        kl_estimate(torch.zeros(2, 3), torch.zeros(2, 3), kind="k1", mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="bool mask"):
        kl_estimate(torch.zeros(3), torch.zeros(3), kind="k1", mask=torch.ones(3))
    with pytest.raises(ShapeError, match=r"got \(2, 3\) and \(3,\)"):
        kl_exact(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ShapeError, match=r"got \(\) and \(\)"):
        kl_exact(torch.tensor(0.0), torch.tensor(0.0))
