import math

import pytest
import torch
from torch.testing import assert_close

from ftlib.batches import Sampling
from ftlib.rollouts.draw import draw, uniforms

PROBS = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
PLAIN = Sampling()
ALMOST_ONE = 1 - 2**-24


def drawn(u, sampling=PLAIN, probs=PROBS):
    tokens, logprobs = draw(probs.log()[None], sampling, torch.tensor([u]))
    return int(tokens[0]), float(logprobs[0])


@pytest.mark.parametrize(
    ("u", "token"), [(0.0, 1), (0.24, 1), (0.26, 3), (0.74, 3), (0.76, 4), (ALMOST_ONE, 4)]
)
def test_the_first_token_whose_cumulative_probability_passes_u(u, token):
    assert drawn(u) == (token, pytest.approx(math.log(PROBS[token])))


def test_the_temperature_flattens():
    """p^(1/2) / sum: sqrt(.25), sqrt(.5), sqrt(.25)."""
    token, logprob = drawn(0.5, Sampling(temperature=2.0))
    assert (token, logprob) == (3, pytest.approx(math.log(0.5**0.5 / (0.5 + 0.5**0.5 + 0.5))))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 1}, [3]),
        ({"top_p": 0.5}, [3]),
        ({"top_p": 0.51}, [1, 3]),
        ({"top_k": 2, "top_p": 0.6}, [1, 3]),
    ],
)
def test_what_is_cut_away_is_never_drawn_and_the_rest_is_renormalised(options, kept):
    """Of two equally likely tokens transformers keeps one; either may be it."""
    share = PROBS[kept] / PROBS[kept].sum()
    for u in (0.0, 0.3, 0.6, ALMOST_ONE):
        token, logprob = drawn(u, Sampling(**options))
        token = 1 if token == 4 else token
        assert token in kept
        assert logprob == pytest.approx(float(share[kept.index(token)].log()), abs=1e-6)


def test_greedy_takes_the_likeliest_whatever_u():
    assert {drawn(u, Sampling(temperature=0))[0] for u in (0.0, 0.5, ALMOST_ONE)} == {3}


def test_rows_do_not_touch_each_other():
    generator = torch.Generator().manual_seed(0)
    logits, u = torch.randn(5, 50, generator=generator), torch.rand(5, generator=generator)
    together = draw(logits, Sampling(), u)
    for row in range(5):
        alone = draw(logits[row : row + 1], Sampling(), u[row : row + 1])
        assert alone[0] == together[0][row]
        assert_close(alone[1][0], together[1][row])


def test_large_logits_stay_finite():
    assert drawn(0.5, probs=torch.tensor([1e30, 0.0])) == (0, 0.0)
    tokens, logprobs = draw(torch.tensor([[1e30, -1e30]]), Sampling(), torch.tensor([ALMOST_ONE]))
    assert (int(tokens), float(logprobs)) == (0, 0.0)


def test_nan_logits_give_a_nan_log_probability():
    tokens, logprobs = draw(torch.full((1, 4), math.nan), Sampling(), torch.tensor([0.5]))
    assert 0 <= int(tokens) < 4
    assert logprobs.isnan().all()


def test_half_precision_is_computed_in_single():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    token, logprob = draw(logits, Sampling(), torch.tensor([0.5]))
    assert_close(logprob, logits.float().log_softmax(-1)[:, token[0]])


def test_a_stream_belongs_to_its_seed_and_sample_and_begins_with_the_shorter_one():
    whole = uniforms(7, 0, 100)
    assert torch.equal(uniforms(7, 0, 30), whole[:30])
    assert not torch.equal(uniforms(7, 1, 100), whole)
    assert not torch.equal(uniforms(8, 0, 100), whole)
    assert whole.min() >= 0
    assert whole.max() < 1
