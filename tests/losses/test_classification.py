"""Classification losses: derived numbers, class weights and their denominator, gradients, extremes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from ftlib.errors import ConfigError, ShapeError
from ftlib.losses import binary_cross_entropy, class_weight_of, cross_entropy

LOGITS_BK = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # p = (3/4, 1/4) and (1/2, 1/2)
LABELS_B = torch.tensor([0, 1])
WEIGHT_K = torch.tensor([2.0, 5.0])


def test_a_row_costs_the_log_of_one_over_its_share():
    assert_close(cross_entropy(LOGITS_BK, LABELS_B), torch.tensor([math.log(4 / 3), math.log(2)]))


def test_class_weights_multiply_a_row_and_are_its_share_of_the_denominator():
    """2 log(4/3) and 5 log 2, over 2 + 5."""
    losses_B = cross_entropy(LOGITS_BK, LABELS_B, weight_K=WEIGHT_K)
    assert_close(losses_B, torch.tensor([2 * math.log(4 / 3), 5 * math.log(2)]))
    assert_close(class_weight_of(LABELS_B, WEIGHT_K), torch.tensor([2.0, 5.0]))
    mean = losses_B.sum() / class_weight_of(LABELS_B, WEIGHT_K).sum()
    assert_close(mean, torch.nn.functional.cross_entropy(LOGITS_BK, LABELS_B, WEIGHT_K))
    assert class_weight_of(LABELS_B).tolist() == [1.0, 1.0]


def test_smoothing_spreads_its_share_over_all_classes():
    """(1 - e) log(4/3) + e/2 (log(4/3) + log 4), with e = 0.2."""
    expected = 0.8 * math.log(4 / 3) + 0.1 * (math.log(4 / 3) + math.log(4))
    found_B = cross_entropy(LOGITS_BK[:1], LABELS_B[:1], label_smoothing=0.2)
    assert_close(found_B, torch.tensor([expected]))


def test_smoothing_and_class_weights_together_are_torchs():
    generator = torch.Generator().manual_seed(0)
    logits_BK, labels_B = torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 3, 0, 1])
    weight_K = torch.tensor([0.5, 1.0, 2.0, 3.0])
    losses_B = cross_entropy(logits_BK, labels_B, weight_K=weight_K, label_smoothing=0.1)
    theirs = torch.nn.functional.cross_entropy(logits_BK, labels_B, weight_K, label_smoothing=0.1)
    assert_close(losses_B.sum() / class_weight_of(labels_B, weight_K).sum(), theirs)


def test_classes_that_exclude_nothing_are_coins_of_their_own():
    """p = 3/4 for a class it has, 1/2 for one it has not: (log(4/3) + log 2) / 2."""
    found_B = binary_cross_entropy(LOGITS_BK[:1], torch.tensor([[1.0, 0.0]]))
    assert_close(found_B, torch.tensor([(math.log(4 / 3) + math.log(2)) / 2]))
    weighted_B = binary_cross_entropy(LOGITS_BK[:1], torch.tensor([[1.0, 0.0]]), weight_K=WEIGHT_K)
    assert_close(weighted_B, torch.tensor([(2 * math.log(4 / 3) + 5 * math.log(2)) / 7]))


def test_a_smoothed_set_of_classes_expects_a_little_of_the_other():
    """Target 1 becomes 0.9, target 0 becomes 0.1; both coins are even, so both cost log 2."""
    even_BK = torch.zeros(1, 2)
    assert_close(
        binary_cross_entropy(even_BK, torch.tensor([[1.0, 0.0]]), label_smoothing=0.2),
        torch.tensor([math.log(2)]),
    )
    found_B = binary_cross_entropy(LOGITS_BK[:1, :1], torch.ones(1, 1), label_smoothing=0.2)
    assert_close(found_B, torch.tensor([0.9 * math.log(4 / 3) + 0.1 * math.log(4)]))


def test_two_classes_that_exclude_each_other_are_one_coin():
    """softmax of (z, 0) is sigmoid(z)."""
    z_B1 = torch.tensor([[1.7], [-0.3]])
    one = cross_entropy(torch.cat([torch.zeros_like(z_B1), z_B1], 1), torch.tensor([1, 0]))
    assert_close(one, binary_cross_entropy(z_B1, torch.tensor([[1.0], [0.0]])))


def test_gradients_are_right():
    generator = torch.Generator().manual_seed(0)
    logits_BK = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weight_K = torch.tensor([0.5, 1.0, 2.0, 3.0])
    targets_BK = torch.randint(2, (3, 4), generator=generator)
    options = {"weight_K": weight_K, "label_smoothing": 0.1}
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy(x, torch.tensor([0, 3, 1]), **options), [logits_BK]
    )
    assert torch.autograd.gradcheck(lambda x: binary_cross_entropy(x, targets_BK, **options), [logits_BK])


def test_extreme_logits_stay_finite_and_bfloat16_is_widened():
    far_BK = torch.tensor([[1e4, -1e4]])
    assert_close(cross_entropy(far_BK, torch.tensor([1])), torch.tensor([2e4]))
    assert_close(binary_cross_entropy(far_BK, torch.tensor([[0.0, 1.0]])), torch.tensor([1e4]))
    assert cross_entropy(far_BK.bfloat16(), torch.tensor([1])).dtype == torch.float32
    assert binary_cross_entropy(far_BK.bfloat16(), torch.ones(1, 2)).dtype == torch.float32


def test_what_would_broadcast_is_refused():
    with pytest.raises(ShapeError, match=r"logits \[B, K\]"):
        cross_entropy(LOGITS_BK, LABELS_B[:, None])
    with pytest.raises(ShapeError, match=r"float32"):
        cross_entropy(LOGITS_BK, LABELS_B.float())
    with pytest.raises(ShapeError, match=r"targets \[B, K\]"):
        binary_cross_entropy(LOGITS_BK, torch.ones(2, 1))
    with pytest.raises(ShapeError, match=r"one weight per class \[2\], got \(3,\)"):
        cross_entropy(LOGITS_BK, LABELS_B, weight_K=torch.ones(3))
    with pytest.raises(ConfigError, match=r"label_smoothing in \[0, 1\)"):
        binary_cross_entropy(LOGITS_BK, LOGITS_BK, label_smoothing=1.0)
