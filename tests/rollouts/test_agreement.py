import dataclasses
import math

import pytest
import torch

from ftlib import models
from ftlib.batches import Group, Rollout, Sampling
from ftlib.data.collate import collate
from ftlib.errors import ShapeError
from ftlib.rollouts import Prompt, TransformersSampler, sampler_agreement
from ftlib.rollouts import collect as collect_rollouts
from tests.models_zoo import tiny_model

HOLE = math.nan


def row(old, sampler, mask=(True, False, True)):
    vectors = [None if each is None else torch.tensor(each) for each in (old, sampler)]
    return Rollout(
        torch.tensor([5]),
        torch.tensor([6, 7, 8]),
        torch.tensor(mask),
        True,
        old_logprobs=vectors[0],
        sampler_logprobs=vectors[1],
    )


def test_hand_values_over_the_sampled_tokens_of_all_rows():
    """|d| = .1, .3 and 0, .2; holes and rows without a sampler's numbers count for nothing."""
    rows = [
        row([-1.0, HOLE, -2.0], [-1.1, HOLE, -1.7]),
        row([-1.0, HOLE, -2.0], [-1.0, HOLE, -2.2]),
        row([-1.0, HOLE, -2.0], None),
    ]
    means = sampler_agreement(rows)
    assert means["sampler_gap"].value == pytest.approx((0.1 + 0.3 + 0.0 + 0.2) / 4)
    ratios = [math.exp(gap) for gap in (0.1, 0.3, 0.0, 0.2)]
    assert means["sampler_ratio"].value == pytest.approx(sum(ratios) / 4)


def test_it_needs_the_trainers_own_numbers():
    with pytest.raises(ShapeError, match="expected old_logprobs"):
        sampler_agreement([row(None, [-1.0, HOLE, -1.0])])


@pytest.mark.parametrize(("trained_at", "agrees"), [(0.7, True), (1.0, False)])
def test_a_trainer_at_another_temperature_is_seen(trained_at, agrees):
    """C4: at the sampling temperature the ratio is 1."""
    model = tiny_model()
    prompts = [Prompt([5, 6]), Prompt([7])]
    sampling = Sampling(temperature=0.7, max_new_tokens=6)
    drawn = collect_rollouts(
        TransformersSampler(model), prompts, lambda p, c: [0.0] * len(p), sampling
    ).rollouts
    rows = []
    for each in drawn:
        weights = (torch.ones(len(each.completion_ids)),)
        group = Group(each.prompt_ids, torch.zeros(len(each.prompt_ids)), (each.completion_ids,), weights)
        with torch.no_grad():
            old = models.forward(model, collate([group]), temperature=trained_at).logprobs_N
        rows.append(dataclasses.replace(each, old_logprobs=old))
    assert (sampler_agreement(rows)["sampler_ratio"].value < 1 + 1e-5) == agrees
