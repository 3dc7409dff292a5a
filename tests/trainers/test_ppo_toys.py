"""PPO reaches the exact optimum of small tasks, told by enumeration (P14, P15).

Each task breaks another mistake: a score on every token, a stop token lost or made up, a score after the
last token, padding counted in positions, an uncentred advantage. Short runs stand here; those of 150
rollouts and five seeds in `test_ppo_toys_full.py`.
"""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tests.trainers.ppo_toys import (
    COPY,
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

# -- the optima themselves: the numbers of a calculation on paper -----------------------------------------

OPTIMA = {  # E[score], KL, J = E - beta KL
    "one token": (0.8668, 0.7442, 0.7179),
    "four tokens": (0.6351, 2.8526, 0.3498),
    "match": (0.9479, 1.1245, 0.6668),
    "stopping": (0.9059, 1.2552, 0.6549),
    "copy": (0.9674, 1.5957, 0.6483),
}


@pytest.mark.parametrize("name", OPTIMA)
def test_the_recursion_finds_the_known_optimum(name):
    task, optimum, (score, kl, total) = TASKS[name], best(TASKS[name]), OPTIMA[name]
    assert optimum.objective == pytest.approx(total, abs=5e-5)
    assert objective(task, optimum.probabilities) == pytest.approx(optimum.objective, abs=1e-12)
    assert objective(task, optimum.probabilities, kl=False) == pytest.approx(score, abs=5e-5)
    assert (score - total) / task.beta == pytest.approx(kl, abs=1e-3)


def test_the_recursion_finds_the_known_probabilities_and_values():
    def near(found, expected):
        assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=5e-5)

    near(
        best(ONE_TOKEN).probabilities[(0,)],
        [0.0035, 0.0070, 0.0144, 0.0294, 0.0601, 0.1227, 0.2507, 0.5121],
    )
    stopping = best(STOPPING)
    near(stopping.probabilities[(0,)], [0.4937, 0.4937, 0.0126])
    near(stopping.probabilities[(0, 0)], [0.1903, 0.7059, 0.1037])
    assert stopping.values[(0, 0)] == pytest.approx(0.7334, abs=5e-5)
    match = best(MATCH)
    assert {round(match.values[(0, first)], 4) for first in range(4)} == {0.6668}, "whatever came first"
    near(best(COPY).probabilities[(2, 2, 2)][2:3], [0.9674])
    near(best(FOUR_TOKENS).probabilities[(0, 3, 1)][3:4], [0.6351])


# -- PPO reaches them ---------------------------------------------------------------------------------------


SHORT = {"rows": 96, "minibatches": 2}
ROLLOUTS = {"one token": 20, "match": 30, "stopping": 30, "copy": 30}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_a_table_learns_the_best_policy_and_its_values(name):
    """P14, P15 (the critic of "match" says .6668 after every first token)."""
    made = trainer(TASKS[name], policy=table, rollouts=ROLLOUTS[name], **SHORT)
    made.train()
    assert_best(TASKS[name], made)


def test_a_transformer_learns_the_best_policy_and_its_values():
    made = trainer(ONE_TOKEN, policy=transformer, rollouts=25, **SHORT)
    made.train()
    assert_best(ONE_TOKEN, made)


@pytest.mark.parametrize("task", [MATCH, STOPPING], ids=["match", "stopping"])
def test_the_optimum_does_not_move_with_lambda(task):
    """A score in the slot after the last token would move it."""
    made = trainer(task, policy=table, rollouts=40, lam=0.8, **SHORT)
    made.train()
    assert_best(task, made)


def test_a_score_far_from_zero_moves_nothing_without_a_critic():
    """T7: five more for every completion, values that stay zero; whitening takes the level off."""
    made = trainer(
        ONE_TOKEN,
        policy=table,
        rollouts=40,
        score=lambda prompt, written: ONE_TOKEN.score(prompt, written) + 5,
        value_learning_rate=0.0,
        **SHORT,
    )
    made.train()
    assert set(values(ONE_TOKEN, made.engine.scorer).values()) == {0.0}
    assert_best(ONE_TOKEN, made, critic=False)


def test_a_critic_alone_learns_the_values_of_a_policy_that_stays():
    """P15, T6: a uniform policy, beta 0, lambda 1."""
    made = trainer(
        CRITIC_ONLY,
        policy=table,
        rollouts=40,
        lam=1.0,
        learning_rate=0.0,
        reference=None,
        log_steps=1,
        **SHORT,
    )
    history = made.train().history
    uniform = torch.full((4,), 0.25, dtype=torch.float64)
    assert all(torch.equal(each, uniform) for each in probabilities(CRITIC_ONLY, made.model).values()), (
        "the policy did not move"
    )
    found = values(CRITIC_ONLY, made.engine.scorer)
    assert found[(0,)] == pytest.approx(0.4375, abs=0.03)
    assert [found[0, first] for first in range(4)] == pytest.approx(
        [0.0625, 0.3125, 0.5625, 0.8125], abs=0.03
    )
    late = [row["explained_variance"] for row in history[-10:]]
    assert sum(late) / len(late) == pytest.approx(0.4348, abs=0.05)


def test_without_a_penalty_the_policy_takes_the_best_token():
    """T2 at beta 0: E of at least .98."""
    made = trainer(FOUR_TOKENS, policy=table, rollouts=40, kl_coef=0.0, reference=None, **SHORT)
    made.train()
    found = probabilities(FOUR_TOKENS, made.model)
    assert objective(FOUR_TOKENS, found, kl=False) >= 0.98
