"""Rewards per token and generalised advantage estimation, with holes and cut rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ftlib.errors import ConfigError, ShapeError
from ftlib.losses import gae, shape_rewards

NAN = float("nan")


def row(*values: float) -> Tensor:
    return torch.tensor([values])


def all_true(like_BL: Tensor) -> Tensor:
    return torch.ones_like(like_BL, dtype=torch.bool)


def mask_of(text: str) -> Tensor:
    return torch.tensor([[letter == "1" for letter in line] for line in text.split()])


# --- shape_rewards ---------------------------------------------------------------------------------


def test_the_kl_is_paid_at_every_token_and_the_score_comes_with_the_last():
    log_ratio_BL = row(0.5, -0.2, 0.1)
    rewards_BL = shape_rewards(torch.ones(1), log_ratio_BL, all_true(log_ratio_BL), beta=0.1)
    assert_close(rewards_BL, row(-0.05, 0.02, 0.99))


@pytest.mark.parametrize(
    ("mask", "at"), [("1110", 2), ("0111", 3), ("1010", 2), ("1100", 1), ("0100", 1), ("1111", 3)]
)
def test_the_score_lies_at_the_last_sampled_token_alone(mask, at):
    rewards_BL = shape_rewards(torch.tensor([7.0]), torch.zeros(1, 4), mask_of(mask), beta=0.1)
    assert rewards_BL.tolist() == [[7.0 if t == at else 0.0 for t in range(4)]]


def test_a_row_without_sampled_tokens_earns_nothing():
    rewards_BL = shape_rewards(torch.tensor([NAN, 1.0]), torch.zeros(2, 2), mask_of("00 11"), beta=0.1)
    assert rewards_BL.tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_copies_of_a_row_have_equal_rewards():
    log_ratio_BL = row(0.5, -0.2, 0.1).repeat(5, 1)
    rewards_BL = shape_rewards(torch.ones(5), log_ratio_BL, all_true(log_ratio_BL), beta=0.1)
    assert torch.equal(rewards_BL, rewards_BL[:1].expand(5, 3))


def test_token_rewards_of_which_the_last_holds_all_are_the_score():
    log_ratio_BL, mask_BL, score = row(0.5, -0.2, 0.1, 0.3), mask_of("1110"), 0.7
    whole = shape_rewards(torch.tensor([score]), log_ratio_BL, mask_BL, beta=0.1)
    tokens_BL = row(0.0, 0.0, score, 0.0)
    assert_close(
        shape_rewards(torch.zeros(1), log_ratio_BL, mask_BL, beta=0.1, token_rewards_BL=tokens_BL), whole
    )


@pytest.mark.parametrize("split", [(0.0, 0.0, 0.7), (0.7, 0.0, 0.0), (0.2, -0.5, 1.0), (0.1, 0.2, 0.4)])
def test_however_a_score_is_split_the_first_return_is_the_same(split):
    """Undiscounted with lam = 1, R_1 is the sum of all rewards."""
    log_ratio_BL, mask_BL = row(0.5, -0.2, 0.1), mask_of("111")
    rewards_BL = shape_rewards(
        torch.zeros(1), log_ratio_BL, mask_BL, beta=0.1, token_rewards_BL=torch.tensor([split])
    )
    _, returns_BL = gae(rewards_BL, row(0.3, -0.1, 0.9), mask_BL, lam=1.0)
    assert_close(returns_BL[0, 0], torch.tensor(0.7 - 0.1 * (0.5 - 0.2 + 0.1)))


# --- gae -------------------------------------------------------------------------------------------

VALUE, LAM = 0.2, 0.95


def test_a_finished_row_of_three():
    """A_3 = 1 - .2 = .8; A_2 = .95 * .8; A_1 = .95^2 * .8; R = A + V."""
    rewards_BL = row(0.0, 0.0, 1.0)
    advantages_BL, returns_BL = gae(rewards_BL, torch.full((1, 3), VALUE), mask_of("111"), lam=LAM)
    assert_close(advantages_BL, row(0.722, 0.76, 0.8))
    assert_close(returns_BL, row(0.922, 0.96, 1.0))


def test_time_does_not_pass_in_a_hole():
    rewards_BL, values_BL, mask_BL = torch.zeros(1, 7), torch.full((1, 7), 0.5), mask_of("1100011")
    rewards_BL[0, -1] = 1.0
    advantages_BL, returns_BL = gae(rewards_BL, values_BL, mask_BL, lam=LAM)
    expected = 0.5 * LAM ** torch.arange(3.0, -1.0, -1.0)
    assert_close(expected, torch.tensor([0.4287, 0.4512, 0.475, 0.5]), rtol=0, atol=5e-5)
    assert_close(advantages_BL[mask_BL], expected)
    assert_close(returns_BL[mask_BL], expected + 0.5)
    assert advantages_BL[~mask_BL].tolist() == returns_BL[~mask_BL].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("lam_value", [None, 1.0])
def test_any_mask_gives_what_the_compacted_rows_give(gamma, lam, lam_value):
    generator = torch.Generator().manual_seed(0)
    rewards_BL, values_BL = torch.randn(2, 16, 12, generator=generator)
    bootstrap_B = torch.randn(16, generator=generator)
    mask_BL = torch.rand(16, 12, generator=generator) < 0.6
    mask_BL[0], mask_BL[1] = True, False
    rewards_BL[~mask_BL] = NAN
    values_BL[~mask_BL] = NAN
    options = {"gamma": gamma, "lam": lam, "lam_value": lam_value}
    advantages_BL, returns_BL = gae(rewards_BL, values_BL, mask_BL, bootstrap_B=bootstrap_B, **options)
    for b, mask_L in enumerate(mask_BL):
        compact = gae(
            rewards_BL[b, mask_L][None],
            values_BL[b, mask_L][None],
            mask_L[mask_L][None],
            bootstrap_B=bootstrap_B[b : b + 1],
            **options,
        )
        assert torch.equal(advantages_BL[b, mask_L], compact[0][0])
        assert torch.equal(returns_BL[b, mask_L], compact[1][0])


def by_definition(rewards: list[float], values: list[float], gamma: float, lam: float, end: float):
    """A_t = sum_k (gamma lam)^k delta_(t+k), written out."""
    following = [*values[1:], end]
    deltas = [r + gamma * n - v for r, v, n in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.9, 1.0), (1.0, 0.0)])
def test_the_recursion_is_the_sum_of_its_definition(gamma, lam):
    rewards, values, end = [0.3, -0.2, 0.0, 1.0], [0.1, 0.4, -0.3, 0.2], 0.7
    expected = by_definition(rewards, values, gamma, lam, end)
    advantages_BL, _ = gae(
        row(*rewards), row(*values), mask_of("1111"), gamma=gamma, lam=lam, bootstrap_B=torch.tensor([end])
    )
    assert_close(advantages_BL, row(*expected))


def test_undiscounted_with_lam_1_it_is_return_minus_value():
    rewards_BL, values_BL = row(0.3, -0.2, 1.0), row(0.1, 0.4, -0.3)
    advantages_BL, returns_BL = gae(rewards_BL, values_BL, mask_of("111"), lam=1.0)
    assert_close(returns_BL, row(1.1, 0.8, 1.0))
    assert_close(advantages_BL, returns_BL - values_BL)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_critic_may_have_its_own_decay(gamma):
    rewards_BL, values_BL, mask_BL = row(0.3, -0.2, 1.0), row(0.1, 0.4, -0.3), mask_of("111")
    policy_BL, _ = gae(rewards_BL, values_BL, mask_BL, gamma=gamma, lam=0.5)
    _, critic_BL = gae(rewards_BL, values_BL, mask_BL, gamma=gamma, lam=1.0)
    both = gae(rewards_BL, values_BL, mask_BL, gamma=gamma, lam=0.5, lam_value=1.0)
    assert_close(both, (policy_BL, critic_BL))


def test_a_cut_row_counts_as_ended_or_as_worth_what_the_critic_says():
    """V = .2 thrice, score 0: A_3 = 0 - .2 where a cut ends the row, .4 - .2 where V(s_4) = .4 stands in."""
    rewards_BL, values_BL = torch.zeros(1, 3), torch.full((1, 3), VALUE)
    terminal_BL, _ = gae(rewards_BL, values_BL, mask_of("111"), lam=LAM)
    bootstrap_BL, _ = gae(rewards_BL, values_BL, mask_of("111"), lam=LAM, bootstrap_B=torch.tensor([0.4]))
    assert_close(terminal_BL[0, -1], torch.tensor(-0.2))
    assert_close(bootstrap_BL[0, -1], torch.tensor(0.2))
    masked_BL, _ = gae(rewards_BL, values_BL, mask_of("000"), bootstrap_B=torch.tensor([0.4]))
    assert masked_BL.tolist() == [[0.0, 0.0, 0.0]]


def test_the_bootstrap_follows_the_last_sampled_token_wherever_it_lies():
    rewards_BL, values_BL = torch.zeros(2, 4), torch.full((2, 4), VALUE)
    advantages_BL, _ = gae(
        rewards_BL, values_BL, mask_of("1110 0111"), lam=LAM, bootstrap_B=torch.tensor([0.4, 0.4])
    )
    assert_close(advantages_BL[0, :3], advantages_BL[1, 1:])
    assert_close(advantages_BL[0, 2], torch.tensor(0.2))


def test_advantages_and_returns_are_targets_without_gradient():
    values_BL = torch.full((1, 3), VALUE, requires_grad=True)
    advantages_BL, returns_BL = gae(row(0.0, 0.0, 1.0), values_BL, mask_of("111"))
    assert not advantages_BL.requires_grad
    assert not returns_BL.requires_grad


def test_inputs_are_left_as_they_were():
    rewards_BL, values_BL, bootstrap_B = row(0.0, 1.0), row(0.2, NAN), torch.tensor([0.4])
    copies = [x.clone() for x in (rewards_BL, values_BL, bootstrap_B)]
    gae(rewards_BL, values_BL, mask_of("10"), bootstrap_B=bootstrap_B)
    assert_close([rewards_BL, values_BL, bootstrap_B], copies, equal_nan=True)


def test_empty_rows_and_empty_batches_have_empty_results():
    for shape in ((2, 0), (0, 3)):
        empty = torch.zeros(*shape)
        advantages_BL, returns_BL = gae(empty, empty, all_true(empty))
        assert advantages_BL.shape == returns_BL.shape == shape
        assert shape_rewards(torch.zeros(shape[0]), empty, all_true(empty), beta=0.1).shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    rewards_BL, values_BL = row(0.3, -0.2, 1.0).to(dtype), row(0.1, 0.4, -0.3).to(dtype)
    low = gae(rewards_BL, values_BL, mask_of("111"), bootstrap_B=torch.tensor([0.5], dtype=dtype))
    wide = gae(rewards_BL.float(), values_BL.float(), mask_of("111"), bootstrap_B=torch.tensor([0.5]))
    assert_close(low, wide)
    shaped = shape_rewards(rewards_BL[:, 0], values_BL, mask_of("111"), beta=0.1)
    assert_close(shaped, shape_rewards(rewards_BL[:, 0].float(), values_BL.float(), mask_of("111"), beta=0.1))


# --- errors ----------------------------------------------------------------------------------------


def test_shapes_that_would_broadcast_are_refused():
    zeros_BL, mask_BL = torch.zeros(2, 3), mask_of("111 111")
    with pytest.raises(ShapeError, match=r"rewards_BL \(2, 3\), values_BL \(2, 4\), mask \(2, 3\)"):
        gae(zeros_BL, torch.zeros(2, 4), mask_BL)
    with pytest.raises(ShapeError, match=r"one shape \[B, L\]"):
        gae(zeros_BL[0], zeros_BL[0], mask_BL[0])
    with pytest.raises(ShapeError, match="bool mask"):
        gae(zeros_BL, zeros_BL, mask_BL.long())
    with pytest.raises(ShapeError, match=r"bootstrap_B of shape \(2,\).*got \(2, 1\)"):
        gae(zeros_BL, zeros_BL, mask_BL, bootstrap_B=torch.zeros(2, 1))
    with pytest.raises(ShapeError, match=r"scores_B of shape \(2,\).*got \(\)"):
        shape_rewards(torch.tensor(1.0), zeros_BL, mask_BL, beta=0.1)
    with pytest.raises(ShapeError, match=r"token_rewards_BL \(2,\)"):
        shape_rewards(torch.zeros(2), zeros_BL, mask_BL, beta=0.1, token_rewards_BL=torch.zeros(2))
    with pytest.raises(ShapeError, match=r"mask \(3, 2\)"):
        shape_rewards(torch.zeros(2), zeros_BL, mask_BL.T, beta=0.1)


@pytest.mark.parametrize("name", ["gamma", "lam", "lam_value"])
@pytest.mark.parametrize("value", [-0.1, 1.1, NAN])
def test_a_discount_or_decay_outside_of_0_to_1_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"gae: expected {name} in \[0, 1\], got {value}"):
        gae(torch.zeros(1, 1), torch.zeros(1, 1), mask_of("1"), **{name: value})


@pytest.mark.parametrize("beta", [-0.1, NAN])
def test_a_negative_penalty_is_refused(beta):
    with pytest.raises(ConfigError, match="beta >= 0"):
        shape_rewards(torch.zeros(1), torch.zeros(1, 1), mask_of("1"), beta=beta)
