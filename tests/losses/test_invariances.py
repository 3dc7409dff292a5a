"""What every loss over a mask promises: blind under False, to the side of the padding, to the order of rows.

One row per function; a new function is tested by adding one. Each takes three float tensors and a mask.

Shapes: B rows, L positions of a padded row, K tokens of one row.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ftlib.losses import (
    explained_variance,
    gae,
    kl_estimate,
    policy_ratio,
    ppo_policy,
    ppo_value,
    reduce,
    shape_rewards,
    whiten,
)

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

PER_TOKEN: dict[str, Loss] = {  # each token depends on its own row
    "ppo_policy": ppo_policy,
    "ppo_policy, dual": lambda x, y, z, mask: ppo_policy(x, y, z, mask, clip=(0.1, 0.3), dual=2.0),
    "ppo_policy, importance": lambda x, y, z, mask: ppo_policy(x, y, z, mask, importance_BL=z.exp()),
    "ppo_value": ppo_value,
    "ppo_value, clip": lambda x, y, z, mask: ppo_value(x, y, z, mask, clip=0.2),
    "policy_ratio": lambda x, y, z, mask: policy_ratio(x, y, mask),
    **{
        f"kl_estimate, {kind}": lambda x, y, z, mask, kind=kind: kl_estimate(x, y, kind=kind, mask=mask)
        for kind in ("abs", "k1", "k2", "k3", "k3_plus")
    },
    "shape_rewards": lambda x, y, z, mask: shape_rewards(
        x.new_full((len(x),), 1.5), x, mask, beta=0.1, token_rewards_BL=y
    ),
    "gae, advantages": lambda x, y, z, mask: gae(x, y, mask, gamma=0.9)[0],
    "gae, returns": lambda x, y, z, mask: gae(x, y, mask, bootstrap_B=torch.ones(len(x)), lam_value=1.0)[1],
}
OVER_ALL: dict[str, Loss] = {  # each token depends on all that counts
    "whiten": lambda x, y, z, mask: whiten(x, mask),
    "whiten, center=False": lambda x, y, z, mask: whiten(x, mask, center=False, unbiased=False),
}
SCALAR: dict[str, Loss] = {
    "reduce, token": lambda x, y, z, mask: reduce(x, mask, denom=7),
    "reduce, row": lambda x, y, z, mask: reduce(x, mask, denom=7, mode="row"),
    "explained_variance": lambda x, y, z, mask: explained_variance(x, y, mask),
}
ALL = PER_TOKEN | OVER_ALL | SCALAR
LENGTHS, WIDTH = [3, 1, 5, 0, 4], 7


def rows_of_tokens() -> list[Tensor]:
    """One [3, K] per row: the three inputs at its tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, length, generator=generator) for length in LENGTHS]


def padded(side: str, width: int = WIDTH, junk: float = 0.0) -> tuple[Tensor, Tensor]:
    """The rows as float [3, B, width] and their mask; `junk` fills the padding."""
    xyz_BL = torch.full((3, len(LENGTHS), width), junk)
    mask_BL = torch.zeros(len(LENGTHS), width, dtype=torch.bool)
    for b, tokens_K in enumerate(rows_of_tokens()):
        length = tokens_K.shape[1]
        place = slice(0, length) if side == "right" else slice(width - length, width)
        xyz_BL[:, b, place] = tokens_K
        mask_BL[b, place] = True
    return xyz_BL, mask_BL


def value_and_gradient(loss: Loss, xyz_BL: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
    """At the tokens that count, the output and the gradients; and the latter must be zero elsewhere."""
    inputs = [x.clone().requires_grad_() for x in xyz_BL]
    out = loss(*inputs, mask_BL)
    gradient = torch.zeros_like(xyz_BL)
    if out.requires_grad:  # the output weighted unevenly, so that whitening has a gradient
        counted = out[mask_BL] if out.ndim else out[None]
        weights = torch.linspace(1, 2, len(counted))
        found = torch.autograd.grad((counted * weights).sum(), inputs, allow_unused=True)
        gradient = torch.stack(
            [torch.zeros_like(mask_BL, dtype=torch.float) if g is None else g for g in found]
        )
    assert gradient[:, ~mask_BL].eq(0).all()
    return (out[mask_BL] if out.ndim else out).detach(), gradient[:, mask_BL]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_what_lies_under_mask_false_changes_neither_output_nor_gradient(name, junk):
    clean = value_and_gradient(ALL[name], *padded("right"))
    assert all(bool(each.isfinite().all()) for each in clean)
    dirty = value_and_gradient(ALL[name], *padded("right", junk=junk))
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("width", [max(LENGTHS), WIDTH, 12])
def test_padding_may_stand_on_either_side_in_any_width(name, width):
    right = value_and_gradient(ALL[name], *padded("right"))
    assert_close(value_and_gradient(ALL[name], *padded("left", width)), right)


@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_row_alone_without_padding_gives_what_it_gives_in_a_batch(name):
    xyz_BL, mask_BL = padded("left")
    out_BL = PER_TOKEN[name](*xyz_BL, mask_BL)
    for b, tokens_K in enumerate(rows_of_tokens()):
        alone_BL = PER_TOKEN[name](*tokens_K[:, None], torch.ones(1, LENGTHS[b], dtype=torch.bool))
        assert_close(alone_BL[0], out_BL[b, mask_BL[b]])


@pytest.mark.parametrize("name", PER_TOKEN | OVER_ALL)
def test_rows_in_another_order_give_the_same_in_that_order(name):
    (xyz_BL, mask_BL), order = padded("right"), torch.tensor([4, 2, 0, 1, 3])
    out_BL = ALL[name](*xyz_BL, mask_BL)
    assert_close(ALL[name](*xyz_BL[:, order], mask_BL[order]), out_BL[order])


@pytest.mark.parametrize("name", SCALAR)
def test_the_order_of_rows_does_not_change_a_scalar(name):
    (xyz_BL, mask_BL), order = padded("right"), torch.tensor([4, 2, 0, 1, 3])
    assert_close(SCALAR[name](*xyz_BL[:, order], mask_BL[order]), SCALAR[name](*xyz_BL, mask_BL))


@pytest.mark.parametrize("name", ALL)
def test_a_mask_of_nothing_gives_finite_numbers_and_no_gradient(name):
    xyz_BL = torch.full((3, 2, 3), float("nan"))
    mask_BL = torch.zeros(2, 3, dtype=torch.bool)
    out, gradient = value_and_gradient(ALL[name], xyz_BL, mask_BL)
    assert bool(out.isfinite().all())
    assert gradient.numel() == 0
    assert bool(ALL[name](*xyz_BL, mask_BL).isfinite().all())


@pytest.mark.parametrize("name", ALL)
def test_float64_stays_float64_and_less_becomes_float32(name):
    xyz_BL, mask_BL = padded("right")
    assert ALL[name](*xyz_BL.double(), mask_BL).dtype == torch.float64
    assert ALL[name](*xyz_BL.bfloat16(), mask_BL).dtype == torch.float32
