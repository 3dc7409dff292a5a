import math

import pytest

from ftlib.evaluation.perplexity import perplexity

LARGEST = math.log(1.7976931348623157e308)  # nats whose exponential is the largest float


def test_a_uniform_guess_among_97_tokens_has_perplexity_97():
    assert perplexity(math.log(97)) == pytest.approx(97)


def test_a_certain_model_has_perplexity_one():
    assert perplexity(0.0) == 1.0


def test_it_is_finite_up_to_the_largest_float_and_infinite_past_it():
    assert math.isfinite(perplexity(LARGEST - 1e-6))
    assert perplexity(LARGEST + 1) == math.inf


def test_nan_and_infinity_stay_what_they_are():
    assert math.isnan(perplexity(math.nan))
    assert perplexity(math.inf) == math.inf
