"""Controllers of the KL penalty: hand values, the way they go, and resuming."""

from __future__ import annotations

import json

import pytest

from ftlib.errors import ConfigError, NonFiniteError
from ftlib.losses import AdaptiveKL, FixedKL

INF, NAN = float("inf"), float("nan")
START, TARGET, HORIZON, SEQUENCES = 0.15, 6.0, 10_000, 512


def after(*measured: float) -> AdaptiveKL:
    controller = AdaptiveKL(START, kl_target=TARGET, kl_horizon=HORIZON)
    for kl in measured:
        controller.update(kl_per_sequence=kl, sequences=SEQUENCES)
    return controller


@pytest.mark.parametrize(
    ("kl", "error"),
    [(9.0, 0.2), (5.7, -0.05), (6.0, 0.0), (6.3, 0.05), (0.0, -0.2), (-1.0, -0.2), (1e9, 0.2)],
)
def test_beta_moves_by_the_clipped_error_times_the_share_of_the_horizon(kl, error):
    assert after(kl).beta == pytest.approx(START * (1 + error * SEQUENCES / HORIZON), rel=1e-12)


def test_the_published_values():
    assert round(after(9.0).beta, 6) == 0.151536
    assert round(after(5.7).beta, 6) == 0.149616


def test_beta_begins_at_its_coefficient_and_compounds():
    assert after().beta == START
    assert after(9.0, 9.0).beta == pytest.approx(START * (1 + 0.2 * SEQUENCES / HORIZON) ** 2, rel=1e-12)


def test_a_mean_per_token_would_call_a_far_policy_near():
    """A KL of 9 over 30 tokens is .3 per token: read as nats per sequence it would lower beta."""
    assert after(9.0).beta > START > after(9.0 / 30).beta


def test_a_resumed_controller_goes_on_as_the_uninterrupted_one():
    state = json.loads(json.dumps(after(9.0, 5.7).state_dict()))
    resumed = after()
    resumed.load_state_dict(state)
    resumed.update(kl_per_sequence=7.0, sequences=SEQUENCES)
    assert resumed.beta == after(9.0, 5.7, 7.0).beta


@pytest.mark.parametrize("kl", [NAN, INF, -INF])
def test_a_kl_that_is_no_number_is_refused_and_beta_stays(kl):
    controller = after(9.0)
    before = controller.beta
    with pytest.raises(NonFiniteError, match="finite kl_per_sequence"):
        controller.update(kl_per_sequence=kl, sequences=SEQUENCES)
    assert controller.beta == before


@pytest.mark.parametrize("sequences", [5 * HORIZON, -1])
def test_so_many_sequences_that_beta_could_turn_negative_are_refused(sequences):
    with pytest.raises(ConfigError, match=f"sequences for a horizon of 10000, got {sequences}.*kl_horizon"):
        after().update(kl_per_sequence=0.0, sequences=sequences)


def test_a_fixed_strength_stays_whatever_was_measured():
    controller = FixedKL(0.05)
    controller.update(kl_per_sequence=100.0, sequences=SEQUENCES)
    assert controller.beta == 0.05


def test_a_fixed_strength_is_a_setting_that_a_resumed_run_may_change():
    changed = FixedKL(0.1)
    changed.load_state_dict(FixedKL(0.05).state_dict())
    assert changed.beta == 0.1


@pytest.mark.parametrize("value", [-0.1, NAN, INF])
def test_a_coefficient_out_of_range_is_refused(value):
    with pytest.raises(ConfigError, match="FixedKL: expected a finite kl_coef >= 0"):
        FixedKL(value)


@pytest.mark.parametrize("name", ["kl_coef", "kl_target", "kl_horizon"])
@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF])
def test_an_adaptive_setting_out_of_range_is_refused_by_name(name, value):
    settings = {"kl_coef": START, "kl_target": TARGET, "kl_horizon": HORIZON}
    with pytest.raises(ConfigError, match=f"AdaptiveKL: expected a finite {name} > 0, got {value}"):
        AdaptiveKL(**settings | {name: value})
