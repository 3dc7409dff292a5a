import dataclasses
import math

import pytest
import torch

from ftlib.batches import Rollout, Sampling
from ftlib.errors import ConfigError, NonFiniteError, ShapeError

IDS = torch.tensor([7, 8, 2])
MASK = torch.tensor([True, False, True])
VECTORS = ("token_rewards", "old_logprobs", "ref_logprobs", "sampler_logprobs", "values")


def rollout(**changes):
    fields = {"prompt_ids": torch.tensor([5, 6]), "completion_ids": IDS, "mask": MASK, "finished": True}
    return Rollout(**(fields | changes))


def test_length_counts_prompt_and_completion():
    assert len(rollout()) == 5


def test_a_row_is_frozen_and_replaced_whole():
    row = rollout(score=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.score = 2.0
    assert dataclasses.replace(row, score=2.0).score == 2.0


@pytest.mark.parametrize("name", VECTORS)
def test_what_the_policy_did_not_sample_may_hold_anything(name):
    """C7, on the record's side."""
    assert getattr(rollout(**{name: torch.tensor([-1.0, math.nan, -2.0])}), name)[0] == -1


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_vector_that_is_not_finite_where_it_counts_is_refused(name, bad):
    with pytest.raises(NonFiniteError, match=f"finite {name} where the mask is True"):
        rollout(**{name: torch.tensor([-1.0, -1.0, bad])})


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize("bad", [torch.zeros(2), torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)])
def test_a_vector_of_another_shape_or_of_integers_is_refused(name, bad):
    with pytest.raises(ShapeError, match=f"expected {name} as floats"):
        rollout(**{name: bad})


@pytest.mark.parametrize("name", ["score", "end_value"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_number_that_is_not_finite_is_refused(name, bad):
    with pytest.raises(NonFiniteError, match=f"finite {name}, got {bad}"):
        rollout(**{name: bad})


@pytest.mark.parametrize("name", ["prompt_ids", "completion_ids"])
@pytest.mark.parametrize("bad", [torch.zeros(0, dtype=torch.long), torch.zeros(3), torch.zeros(1, 3).long()])
def test_ids_are_a_vector_of_integers_with_a_token(name, bad):
    with pytest.raises(ShapeError, match=f"expected {name} as a vector of int64"):
        rollout(**{name: bad})


@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, dtype=torch.bool)])
def test_the_mask_is_bool_and_fits(bad):
    with pytest.raises(ShapeError, match="expected mask as bool"):
        rollout(mask=bad)


def test_a_row_without_a_sampled_token_is_refused():
    with pytest.raises(ShapeError, match="at least one sampled token"):
        rollout(mask=torch.zeros(3, dtype=torch.bool))


def test_greedy_decoding_is_refused_for_training():
    with pytest.raises(ConfigError, match="greedy decoding"):
        rollout(sampling=Sampling(temperature=0))


@pytest.mark.parametrize("sampling", [Sampling(top_p=0.9), Sampling(top_k=5)])
def test_top_p_and_top_k_need_the_samplers_logprobs(sampling):
    """P7"""
    with pytest.raises(ConfigError, match="expected sampler_logprobs"):
        rollout(sampling=sampling)
    assert rollout(sampling=sampling, sampler_logprobs=-torch.ones(3)).sampling.warped


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"n": 0},
        {"stop_strings": ("",)},
    ],
)
def test_sampling_out_of_range_is_refused(options):
    with pytest.raises(ConfigError, match="Sampling: expected"):
        Sampling(**options)


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {"top_k": 3}, {"n": 2}])
def test_options_without_effect_on_greedy_decoding_are_refused(options):
    with pytest.raises(ConfigError, match="no effect at temperature 0"):
        Sampling(temperature=0, **options)
