"""The Reward objective: derived numbers of hand-made scores, and a tiny reward model end to end."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ftlib.errors import CapabilityError, ConfigError, ShapeError
from ftlib.models import Scored
from ftlib.objectives import Reward
from tests.models_zoo import tiny_model
from tests.objectives.answers import answers, batch_of, pair, scores


def log1pexp(x):
    return math.log1p(math.exp(x))


def test_the_loss_is_bradley_terry_per_pair():
    """Leads of 1 and -2: log(1 + e^-1) + log(1 + e^2)."""
    term = Reward().of(scores(1, 0, 3, 5), batch_of(pair(), pair())).terms["bradley_terry"]
    assert_close(term.sum, torch.tensor(log1pexp(-1) + log1pexp(2)))
    assert term.count == 2


def test_margin_and_centring_reach_the_loss():
    """Lead 1, margin 0.5, and 0.01 (1 + 0)^2."""
    output = Reward(center=0.01).of(scores(1, 0), batch_of(pair(margin=[0.5, 0.0])))
    assert_close(output.terms["bradley_terry"].sum, torch.tensor(log1pexp(-0.5) + 0.01))


def test_a_ranking_costs_the_mean_of_its_pairs():
    """Leads 1, 2, 1 of scores 2, 1, 0."""
    term = Reward().of(scores(2, 1, 0), batch_of(answers(1, 2, 3))).terms["bradley_terry"]
    assert_close(term.value, torch.tensor((2 * log1pexp(-1) + log1pexp(-2)) / 3))


def test_metrics_of_a_won_a_lost_and_a_tied_pair():
    metrics = Reward().of(scores(3, 1, 0, 4, 2, 2), batch_of(pair(), pair(), pair())).metrics
    assert {name: mean.value.item() for name, mean in metrics.items()} == pytest.approx(
        {
            "accuracy": 1.5 / 3,
            "tie_rate": 1 / 3,
            "margin": (2 - 4 + 0) / 3,
            "reward_chosen": (3 + 0 + 2) / 3,
            "reward_rejected": (1 + 4 + 2) / 3,
        }
    )
    assert not any(mean.sum.requires_grad for mean in metrics.values())


def test_the_gradient_pushes_the_sides_apart_by_the_chance_of_being_wrong():
    """d/dr -log sigmoid(r_w - r_l) = -+ sigmoid(r_l - r_w)."""
    scored = scores(1, 0)
    Reward().of(scored, batch_of(pair())).terms["bradley_terry"].sum.backward()
    wrong = 1 / (1 + math.e)
    assert_close(scored.scores_CK.grad, torch.tensor([[-wrong], [wrong]]))


@pytest.mark.parametrize("center", [-1.0, math.inf, math.nan])
def test_a_bad_center_is_refused_at_construction(center):
    with pytest.raises(ConfigError, match="center: expected a finite number >= 0"):
        Reward(center=center)


def test_what_is_not_one_score_per_answer_is_refused():
    with pytest.raises(ShapeError, match=r"\[2, 1\], got None.*task="):
        Reward().of(Scored(torch.zeros(5)), batch_of(pair()))
    with pytest.raises(ShapeError, match=r"\[2, 1\], got \(2, 2\)"):
        Reward().of(replace(scores(1, 0), scores_CK=torch.zeros(2, 2)), batch_of(pair()))


def test_a_language_model_is_refused():
    with pytest.raises(CapabilityError, match="reward"):
        Reward()(tiny_model("llama"), batch_of(pair()))
