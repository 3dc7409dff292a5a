import asyncio
import math
import threading

import numpy as np
import pytest
import torch
from trl.rewards import get_soft_overlong_punishment, think_format_reward

from ftlib.errors import ConfigError, DataError, NonFiniteError, ShapeError
from ftlib.rollouts.rewards import Asking, RewardOut, reward_rows
from ftlib.rollouts.rewards import values as module

ROWS = 4
IDS = [[3, 4], [3], [3, 4, 5], [3, 4]]
ALL = Asking(max_drop_frac=1.0)


def rewarded(reward, asking=ALL, **columns):
    prompts, completions = [f"p{i}" for i in range(ROWS)], [f"c{i}" for i in range(ROWS)]
    return reward_rows(reward, prompts, completions, {"completion_ids": IDS, **columns}, asking=asking)


def scores(values):
    return [None if value is None else value.score for value in values]


def fixed(*items):
    """A reward that gives these items, whatever it is asked."""
    return lambda prompts, completions, **columns: list(items)


@pytest.fixture
def naps(monkeypatch):
    """Pauses between tries, noted instead of slept."""
    noted = []
    monkeypatch.setattr(module.time, "sleep", noted.append)
    return noted


# --- P20: None, 0.0, NaN, exception, wrong length --------------------------------------------------


def test_none_leaves_a_row_out_and_zero_is_a_score():
    assert scores(rewarded(fixed(0.0, None, -1.5, 2))) == [0.0, None, -1.5, 2.0]


def test_more_rows_left_out_than_allowed_are_named():
    with pytest.raises(DataError, match=r"all but 25% of the rows, got none for 2 of 4: rows 1, 3"):
        rewarded(fixed(0.0, None, 1.0, None), Asking(max_drop_frac=0.25))
    assert scores(rewarded(fixed(0.0, None, 1.0, 1.0), Asking(max_drop_frac=0.25)))[1] is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_named(bad):
    with pytest.raises(NonFiniteError, match=r"rows 1, 2 \(counted from 0\)"):
        rewarded(fixed(0.0, bad, RewardOut(bad), 1.0))


def test_a_token_reward_that_is_not_finite_is_named():
    with pytest.raises(NonFiniteError, match="rows 0"):
        rewarded(fixed(torch.tensor([0.0, math.nan]), 1.0, 1.0, 1.0))


@pytest.mark.parametrize("items", [(), (1.0,), (1.0,) * 5])
def test_another_number_of_items_than_rows_is_refused(items):
    with pytest.raises(ShapeError, match=f"expected 4 items, one for each of rows 0 to 3, got {len(items)}"):
        rewarded(fixed(*items))


@pytest.mark.parametrize("answer", [1.0, "1234", None, {"score": 1.0}])
def test_an_answer_that_is_no_list_is_refused(answer):
    with pytest.raises(ShapeError, match="expected a list with one item per row"):
        rewarded(lambda prompts, completions, **columns: answer)


def test_token_rewards_are_one_per_completion_token():
    values = rewarded(fixed(torch.tensor([0.5, 1.0]), 1.0, torch.zeros(3), RewardOut(2.0, torch.ones(2))))
    assert values[0].token_rewards.tolist() == [0.5, 1.0]
    assert values[0].score is None
    assert (values[3].score, values[3].token_rewards.tolist()) == (2.0, [1.0, 1.0])
    with pytest.raises(ShapeError, match=r"expected 1 token rewards in row 1 .*got \(2,\)"):
        rewarded(fixed(1.0, torch.zeros(2), 1.0, 1.0))


@pytest.mark.parametrize("item", ["1.0", [1.0], object()])
def test_an_item_that_is_no_reward_is_refused(item):
    with pytest.raises(DataError, match="<reward>:2: expected a number"):
        rewarded(fixed(1.0, 1.0, item, 1.0))


def test_numbers_of_every_kind_are_scores():
    items = (True, np.float32(0.5), torch.tensor(2.0), RewardOut(torch.tensor(3.0)))
    assert scores(rewarded(fixed(*items))) == [1.0, 0.5, 2.0, 3.0]
    assert scores(rewarded(lambda prompts, completions: torch.arange(4.0))) == [0.0, 1.0, 2.0, 3.0]
    assert scores(rewarded(lambda prompts, completions: np.arange(4))) == [0.0, 1.0, 2.0, 3.0]


# --- how a function is called ----------------------------------------------------------------------


def test_columns_reach_the_function():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0] * len(prompts)

    rewarded(reward, answer=["a", "b", "c", "d"])
    assert seen["answer"] == ["a", "b", "c", "d"]
    assert seen["completion_ids"] == IDS
    assert (seen["prompts"][1], seen["completions"][1]) == ("p1", "c1")


def test_a_function_gets_the_columns_it_names_and_arguments_under_any_name():
    by_answer = lambda prompts, completions, answer: answer  # noqa: E731
    assert scores(rewarded(by_answer, answer=[1, 2, 3, 4])) == [1, 2, 3, 4]
    by_position = lambda x, y, **rest: [len(p) + len(c) for p, c in zip(x, y, strict=True)]  # noqa: E731
    assert scores(rewarded(by_position)) == [4.0] * ROWS


@pytest.mark.oracle
def test_the_reward_functions_of_trl_fit():
    punish = get_soft_overlong_punishment(max_completion_len=2, soft_punish_cache=1)
    assert scores(rewarded(punish)) == punish(completion_ids=IDS)
    messages = [[{"role": "assistant", "content": "<think>\nyes\n</think>\nno"}]]
    values = reward_rows(think_format_reward, ["?"], messages, {"completion_ids": [[3]]})
    assert scores(values) == [1.0]


def test_an_async_function_is_awaited_also_inside_a_running_loop():
    async def reward(prompts, completions, **columns):
        await asyncio.sleep(0)
        return [1.0] * len(prompts)

    async def notebook():
        return rewarded(reward)

    assert scores(rewarded(reward)) == scores(asyncio.run(notebook())) == [1.0] * ROWS


def test_a_batch_size_splits_the_calls_and_their_columns():
    seen = []

    def reward(prompts, completions, answer, **columns):
        seen.append(answer)
        return [float(number) for number in answer]

    assert scores(rewarded(reward, Asking(batch_size=3), answer=[1, 2, 3, 4])) == [1, 2, 3, 4]
    assert seen == [[1, 2, 3], [4]]


# --- failures --------------------------------------------------------------------------------------


class Flaky:
    """Fails so many times, then works."""

    def __init__(self, failures):
        self.failures = failures
        self.calls = 0

    def __call__(self, prompts, completions, **columns):
        self.calls += 1
        if self.calls <= self.failures:
            raise OSError("no answer")
        return [1.0] * len(prompts)


def test_an_exception_propagates_after_the_retries_and_says_which_rows(naps):
    reward = Flaky(3)
    with pytest.raises(OSError, match="no answer") as caught:
        rewarded(reward, Asking(retries=2, retry_delay=0.5))
    assert reward.calls == 3
    assert naps == [0.5, 1.0]
    assert caught.value.__notes__ == ["reward: rows 0 to 3 (counted from 0), 3 tries."]


def test_a_retry_that_works_is_enough(naps):
    assert scores(rewarded(Flaky(2), Asking(retries=2))) == [1.0] * ROWS
    assert naps == [1.0, 2.0]


def test_dropping_an_error_leaves_out_the_rows_of_that_call_and_gives_no_zero():
    reward = Flaky(1)
    values = rewarded(reward, Asking(on_error="drop", batch_size=1, max_drop_frac=0.25))
    assert scores(values) == [None, 1.0, 1.0, 1.0]


def test_dropped_errors_count_against_the_share():
    with pytest.raises(DataError, match="got none for 4 of 4"):
        rewarded(Flaky(1), Asking(on_error="drop"))


def test_a_wrong_number_of_items_is_no_error_to_drop():
    with pytest.raises(ShapeError, match="expected 4 items"):
        rewarded(fixed(1.0), Asking(on_error="drop", max_drop_frac=1.0))


def test_a_function_that_hangs_is_left_behind():
    free = threading.Event()
    with pytest.raises(TimeoutError, match=r"within 0\.01 seconds"):
        rewarded(lambda prompts, completions: free.wait() and [], Asking(timeout=0.01))
    free.set()


def test_a_coroutine_that_hangs_is_left_behind():
    async def reward(prompts, completions):
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError, match=r"within 0\.01 seconds"):
        rewarded(reward, Asking(timeout=0.01))


def test_a_function_within_its_time_is_not_disturbed():
    assert scores(rewarded(fixed(1, 2, 3, 4), Asking(timeout=60.0))) == [1, 2, 3, 4]


def test_the_functions_own_timeout_keeps_its_message():
    def reward(prompts, completions):
        raise TimeoutError("upstream is slow")

    with pytest.raises(TimeoutError, match="upstream is slow"):
        rewarded(reward, Asking(timeout=60.0))


@pytest.mark.parametrize(
    "options",
    [
        {"retries": -1},
        {"retry_delay": -1.0},
        {"timeout": 0.0},
        {"on_error": "ignore"},
        {"max_drop_frac": 1.5},
        {"batch_size": 0},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="Asking: expected"):
        Asking(**options)
