"""Likelihood losses: derived numbers, identities, gradients and extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ftlib.errors import ConfigError, ShapeError
from ftlib.losses import entropy, nll, token_logprobs

INF = float("inf")


def random_logits(rows: int = 3, vocabulary: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, vocabulary, generator=generator, dtype=dtype)


def test_a_token_of_probability_one_quarter_costs_log_4() -> None:
    assert_close(nll(torch.tensor([0.25]).log()), torch.tensor([math.log(4)]))


def test_odds_of_three_to_one_give_probability_three_quarters() -> None:
    """softmax([log 3, 0]) = [3/4, 1/4]."""
    logits_TV = torch.tensor([[math.log(3), 0.0]] * 2)
    assert_close(token_logprobs(logits_TV, torch.tensor([0, 1])).exp(), torch.tensor([0.75, 0.25]))


def test_temperature_2_takes_the_root_of_the_odds() -> None:
    """softmax([log 9, 0] / 2) = [3/4, 1/4]."""
    logits_TV = torch.tensor([[math.log(9), 0.0]])
    assert_close(token_logprobs(logits_TV, torch.tensor([0]), temperature=2.0).exp(), torch.tensor([0.75]))


def test_entropy_of_a_fair_choice_of_n_is_log_n() -> None:
    assert_close(entropy(torch.full((1, 8), 3.0)), torch.tensor([math.log(8)]))


def test_entropy_of_three_to_one() -> None:
    """-(3/4) log(3/4) - (1/4) log(1/4) = log 4 - (3/4) log 3."""
    assert_close(
        entropy(torch.tensor([[math.log(3), 0.0]])), torch.tensor([math.log(4) - 0.75 * math.log(3)])
    )


def test_probabilities_of_all_tokens_sum_to_one() -> None:
    row_V = random_logits(1)[0]
    logprobs_V = token_logprobs(row_V.expand(5, 5), torch.arange(5))
    assert_close(logprobs_V.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_entropy_is_the_expected_nll() -> None:
    row_V = random_logits(1)[0]
    logprobs_V = token_logprobs(row_V.expand(5, 5), torch.arange(5))
    assert_close(entropy(row_V[None])[0], (logprobs_V.exp() * nll(logprobs_V)).sum())


def test_a_shift_of_all_logits_changes_nothing() -> None:
    logits_TV, targets_T = random_logits(), torch.tensor([0, 4, 2])
    assert_close(token_logprobs(logits_TV + 7, targets_T), token_logprobs(logits_TV, targets_T))
    assert_close(entropy(logits_TV + 7), entropy(logits_TV))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_are_those_of_finite_differences(temperature: float) -> None:
    logits_TV, targets_T = random_logits().requires_grad_(), torch.tensor([0, 4, 2])

    def loss(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
        return nll(token_logprobs(logits_TV, targets_T, temperature=temperature)), entropy(logits_TV)

    assert torch.autograd.gradcheck(loss, logits_TV)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite_in_value_and_gradient(dtype: torch.dtype) -> None:
    large = 6e4 if dtype == torch.float16 else 1e30
    logits_TV = torch.tensor([[large, -large, 0.0], [0.0, 0.0, -large]], dtype=dtype, requires_grad=True)
    logprobs_T, entropy_T = token_logprobs(logits_TV, torch.tensor([0, 1])), entropy(logits_TV)
    (nll(logprobs_T).sum() + entropy_T.sum()).backward()
    assert logprobs_T.dtype == entropy_T.dtype == torch.float32
    assert_close(logprobs_T, torch.tensor([0.0, -math.log(2)]))
    assert_close(entropy_T, torch.tensor([0.0, math.log(2)]))
    assert logits_TV.grad is not None
    assert bool(logits_TV.grad.isfinite().all())


def test_impossible_tokens_add_no_entropy_and_no_gradient() -> None:
    """Two possible tokens of equal logit: log 2, whatever else is excluded."""
    logits_TV = torch.tensor([[1.0, -INF, 1.0, -INF]], requires_grad=True)
    value_T = entropy(logits_TV)
    value_T.sum().backward()
    assert_close(value_T, torch.tensor([math.log(2)]))
    assert_close(logits_TV.grad, torch.zeros(1, 4))


def test_bf16_logits_are_computed_in_float32() -> None:
    logits_TV, targets_T = random_logits(dtype=torch.float32).bfloat16(), torch.tensor([0, 4, 2])
    assert_close(token_logprobs(logits_TV, targets_T), token_logprobs(logits_TV.float(), targets_T))
    assert nll(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"got \(2, 1\)"):
        nll(torch.zeros(2, 1))
    with pytest.raises(ShapeError, match=r"got \(2, 3\) and \(2, 1\)"):
        token_logprobs(torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ShapeError, match=r"got \(1, 2, 3\)"):
        entropy(torch.zeros(1, 2, 3))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ConfigError, match="temperature > 0"):
        token_logprobs(torch.zeros(1, 3), torch.tensor([0]), temperature=temperature)
