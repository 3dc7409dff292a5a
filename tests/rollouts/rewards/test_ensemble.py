import asyncio
import inspect
import math

import pytest
import torch

from ftlib.errors import ConfigError, ShapeError
from ftlib.rollouts.rewards import RewardOut, ensemble, reward_rows


def giving(*items):
    return lambda prompts, completions, **columns: list(items)


ONE, TWO, SIX = giving(1.0), giving(2.0), giving(6.0)


def only(reward, length=2):
    (value,) = reward_rows(reward, ["?"], ["!"], {"completion_ids": [[3] * length]})
    return value


@pytest.mark.parametrize(
    ("reduce", "expected"),
    [
        ("mean", (1 + 2 + 6) / 3),
        ("min", 1.0),
        ("mean-std", 3 - math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 3)),  # .8398
    ],
)
def test_hand_values(reduce, expected):
    assert only(ensemble([ONE, TWO, SIX], reduce)).score == pytest.approx(expected, abs=1e-12)


def test_members_are_logged_under_their_names():
    def helpful(prompts, completions, **columns):
        return [RewardOut(1.0, info={"words": 7.0})]

    value = only(ensemble([helpful, TWO, SIX]))
    assert value.info == {"helpful": 1.0, "<lambda>_1": 2.0, "<lambda>_2": 6.0, "helpful/words": 7.0}
    assert only(ensemble({"short": ONE, "true": TWO})).info == {"short": 1.0, "true": 2.0}


def test_one_missing_member_drops_the_row_unless_skipped():
    none = giving(None)
    assert ensemble([ONE, none])(["?"], ["!"]) == [None]
    value = only(ensemble([ONE, none, SIX], skip_none=True))
    assert (value.score, len(value.info)) == (3.5, 2)
    assert ensemble([none, none], skip_none=True)(["?"], ["!"]) == [None]


def test_token_rewards_are_reduced_token_by_token():
    members = [giving(torch.tensor([1.0, 0.0])), giving(torch.tensor([3.0, -1.0]))]
    assert only(ensemble(members, "min")).token_rewards.tolist() == [1.0, -1.0]


def test_scores_and_token_rewards_do_not_mix():
    with pytest.raises(ShapeError, match="of one kind"):
        only(ensemble([ONE, giving(torch.zeros(2))]))


def test_a_member_that_forgets_rows_is_named():
    with pytest.raises(ShapeError, match="expected 1 items from 'b', one per row, got 2"):
        only(ensemble({"a": ONE, "b": giving(1.0, 2.0)}))


def test_async_members_wait_together():
    started = []

    def slow(name, number):
        async def reward(prompts, completions, **columns):
            started.append(name)
            while len(started) < 2:  # ends only where both have begun
                await asyncio.sleep(0)
            return [number]

        return reward

    combined = ensemble({"a": slow("a", 1.0), "b": slow("b", 3.0), "c": TWO})
    assert only(combined).score == 2.0
    assert not inspect.isawaitable(ensemble([ONE])(["?"], ["!"]))


def test_ensembles_nest():
    assert only(ensemble({"low": ensemble([ONE, SIX], "min"), "high": SIX})).score == 3.5


@pytest.mark.parametrize(("members", "reduce"), [([], "mean"), ([ONE], "median")])
def test_what_makes_no_ensemble_is_refused(members, reduce):
    with pytest.raises(ConfigError, match=r"ensemble: (members|reduce): expected"):
        ensemble(members, reduce)
