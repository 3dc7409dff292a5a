"""Warnings of PPO: what is seen, that it is told once, and what stops a run."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from ftlib.engine import PPOConfig
from ftlib.errors import ConfigError
from ftlib.objectives import PPO
from ftlib.trainers.ppo_health import CHECKS, Health
from ftlib.trainers.ppo_metrics import derived
from tests.objectives.rollouts import rollout
from tests.trainers.ppo_tiny import ppo

LOGGER = "ftlib.trainers.ppo_health"
HEALTHY = {
    "step": 7.0,
    "kl": 3.0,
    "first_ratio_deviation": 0.0,
    "clip_fraction": 0.1,
    "explained_variance": 0.5,
    "finished": 0.9,
    "completion_tokens": 10.0,
    "sampler_ratio": 1.01,
    "score_std": 0.4,
}
ILL: dict[str, dict[str, float]] = {
    "kl_negative": {"kl": -1.1},
    "kl_high": {"kl": 30.1},
    "first_ratio": {"first_ratio_deviation": 0.06},
    "clip_fraction": {"clip_fraction": 0.31},
    "explained_variance": {"explained_variance": -0.01},
    "unfinished": {"finished": 0.49},
    "length_drift": {"completion_tokens": 20.1},
    "sampler": {"sampler_ratio": 1.11},
    "flat_score": {"score_std": 0.0},
}


def health(**options: Any) -> Health:
    """Of a run with a target of 6 nats that has had its first row, of completions of 10 tokens."""
    made = Health(PPOConfig(kl_target=6.0, critic_warmup=5, **options))
    made.look(HEALTHY)
    return made


def told(caplog: Any) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def test_a_healthy_row_says_nothing(caplog):
    health().look(HEALTHY | {"completion_tokens": 20.0, "kl": 30.0, "score_std": 1e-3})
    assert told(caplog) == []


def test_every_check_is_tried_here():
    assert ILL.keys() == CHECKS.keys()


@pytest.mark.parametrize("name", ILL)
def test_what_is_wrong_is_told_once_with_its_step_and_what_to_do(caplog, name):
    looking = health()
    looking.look(HEALTHY | ILL[name])
    looking.look(HEALTHY | ILL[name] | {"step": 8.0})
    [message] = told(caplog)
    assert message.startswith(f"step 7: {CHECKS[name]}")
    assert f"stop_on=[{name!r}]" in message


@pytest.mark.parametrize("name", ILL)
def test_a_run_stops_on_what_it_was_asked_to_stop_on(name):
    with pytest.raises(ConfigError, match="stopped: step 7"):
        health(stop_on=[name]).look(HEALTHY | ILL[name])


def test_several_warnings_are_each_told(caplog):
    health().look(HEALTHY | ILL["kl_high"] | ILL["unfinished"])
    assert len(told(caplog)) == 2


def test_completions_half_as_long_as_at_the_start_have_drifted(caplog):
    health().look(HEALTHY | {"completion_tokens": 4.9})
    assert len(told(caplog)) == 1


def test_a_critic_that_still_warms_up_need_not_explain(caplog):
    looking = health()
    looking.look(HEALTHY | ILL["explained_variance"] | {"step": 5.0})
    assert told(caplog) == []
    looking.look(HEALTHY | ILL["explained_variance"] | {"step": 6.0})
    assert len(told(caplog)) == 1


def test_without_a_target_no_kl_is_high(caplog):
    Health(PPOConfig()).look(HEALTHY | ILL["kl_high"])
    assert told(caplog) == []


def test_a_resumed_run_knows_what_was_told_and_how_long_completions_were(caplog):
    first, second = health(), Health(PPOConfig(kl_target=6.0))
    first.look(HEALTHY | ILL["kl_high"])
    second.load_state_dict(first.state_dict())
    caplog.clear()
    second.look(HEALTHY | ILL["kl_high"])
    assert told(caplog) == []
    second.look(HEALTHY | ILL["length_drift"])
    assert len(told(caplog)) == 1


def test_a_name_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"expected stop_on names of .*got \['kl'\]"):
        Health(PPOConfig(stop_on=["kl"]))


# -- in a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [0.0, 0.1, 0.3, 1e6 / 3])
def test_scores_that_are_all_equal_are_seen_in_spite_of_rounding(caplog, score):
    def same(prompts: Any, completions: Any) -> list[float]:
        return [score] * len(prompts)

    trainer = ppo(reward=same, missing_stop_penalty=0.0, samples_per_prompt=5, batch_size=20, max_steps=2)
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        trainer.train()
    assert sum("all scores of a rollout are equal" in message for message in told(caplog)) == 1


def test_a_run_ends_where_it_was_asked_to():
    trainer = ppo(
        reward=lambda prompts, completions: [1.0] * len(prompts),
        missing_stop_penalty=0.0,
        stop_on=["flat_score"],
        max_steps=3,
    )
    with pytest.raises(ConfigError, match="stopped: step 1: all scores of a rollout are equal"):
        trainer.train()
    assert trainer.iteration == 1


# -- the numbers that are no means ------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, 1000.0, -3e4])
def test_deviations_do_not_drown_in_the_level(level):
    """Two scores one apart have a deviation of a half."""
    rows = [rollout(old=[-1.0], score=level + place % 2) for place in range(64)]
    metrics = PPO(whiten_advantages=False).prepare(rows, beta=0.0).metrics
    row = derived({name: float(mean.sum) / float(mean.count) for name, mean in metrics.items()})
    assert row["score_std"] == pytest.approx(0.5, rel=1e-4)
    assert row["return_std"] == pytest.approx(0.5, rel=1e-4)
    assert row["explained_variance"] == pytest.approx(0.0, abs=1e-3), "values of zero explain nothing"


def test_explained_variance_is_that_of_returns():
    rows = [rollout(old=[-1.0], score=score, values=[score / 2]) for score in (0.0, 1.0)]
    metrics = PPO(missing_stop_penalty=0.0).prepare(rows, beta=0.0).metrics
    row = derived({name: float(mean.sum) / float(mean.count) for name, mean in metrics.items()})
    assert row["explained_variance"] == pytest.approx(0.75)
    assert not {name for name in row if "squared" in name or name == "error"}


def test_returns_that_do_not_vary_leave_nothing_to_explain():
    rows = [rollout(old=[-1.0], score=0.1, values=[value]) for value in (0.0, 1.0)]
    metrics = PPO(missing_stop_penalty=0.0).prepare(rows, beta=0.0).metrics
    row = derived({name: float(mean.sum) / float(mean.count) for name, mean in metrics.items()})
    assert "explained_variance" not in row
    assert row["return_std"] == 0.0
