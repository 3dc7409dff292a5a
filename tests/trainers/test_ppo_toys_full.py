"""The long runs of `test_ppo_toys.py`: 150 rollouts of 192 rows, five seeds, minutes each (P14, P15).

pytest -m long tests/trainers/test_ppo_toys_full.py
"""

from __future__ import annotations

import pytest

from tests.trainers.ppo_toys import (
    CRITIC_ONLY,
    FOUR_TOKENS,
    MATCH,
    ONE_TOKEN,
    STOPPING,
    TASKS,
    assert_best,
    best,
    objective,
    probabilities,
    table,
    trainer,
    transformer,
    values,
)

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.skipif("'long' not in config.option.markexpr", reason="minutes each: -m long"),
    pytest.mark.parametrize("seed", range(5)),
    pytest.mark.parametrize("policy", [table, transformer]),
]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "four tokens"])
def test_the_best_policy_and_its_values_are_learned(name, policy, seed):
    made = trainer(TASKS[name], policy=policy, seed=seed)
    made.train()
    assert_best(TASKS[name], made)


@pytest.mark.parametrize("task", [MATCH, STOPPING], ids=["match", "stopping"])
def test_the_optimum_does_not_move_with_lambda(task, policy, seed):
    made = trainer(task, policy=policy, seed=seed, lam=0.8)
    made.train()
    assert_best(task, made)


def test_four_tokens_come_near_the_best_objective(policy, seed):
    made = trainer(FOUR_TOKENS, policy=policy, seed=seed)
    made.train()
    found = objective(FOUR_TOKENS, probabilities(FOUR_TOKENS, made.model))
    assert found == pytest.approx(best(FOUR_TOKENS).objective, abs=0.02)


def test_a_score_far_from_zero_moves_nothing_without_a_critic(policy, seed):
    made = trainer(
        ONE_TOKEN,
        policy=policy,
        seed=seed,
        score=lambda prompt, written: ONE_TOKEN.score(prompt, written) + 5,
        value_learning_rate=0.0,
    )
    made.train()
    assert_best(ONE_TOKEN, made, critic=False)


def test_a_critic_alone_learns_the_values_of_a_policy_that_stays(policy, seed):
    made = trainer(
        CRITIC_ONLY, policy=policy, seed=seed, rollouts=60, lam=1.0, learning_rate=0.0, reference=None
    )
    made.train()
    found = values(CRITIC_ONLY, made.engine.scorer)
    assert found[(0,)] == pytest.approx(0.4375, abs=0.03)
    expected = [0.0625, 0.3125, 0.5625, 0.8125]
    assert [found[0, first] for first in range(4)] == pytest.approx(expected, abs=0.03)
