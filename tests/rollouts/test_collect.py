import math

import pytest
import torch

from ftlib.batches import Sampling
from ftlib.errors import ConfigError, DataError, NonFiniteError, ShapeError
from ftlib.rollouts import FunctionSampler, Prompt, Sampled, TransformersSampler, collect, prompt_seeds
from ftlib.rollouts.rewards import Asking, RewardOut, ensemble
from tests.data.tokenizers_zoo import tiny
from tests.models_zoo import EOS, tiny_model

SAMPLING = Sampling(max_new_tokens=6, stop_ids=(EOS,), n=2)
CHAT = [{"role": "user", "content": "why?"}]
PROMPTS = [Prompt([5, 6], "yes?", {"answer": 1}), Prompt([7], CHAT, {"source": "b"}), Prompt([8, 9, 10])]


def by_length(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def writes(*rows):
    """A sampler that writes these ids, prompt after prompt."""
    return FunctionSampler(lambda prompts, sampling, seeds: rows)


def test_rows_are_what_the_sampler_drew_and_the_reward_gave():
    sampler = TransformersSampler(tiny_model())
    collected = collect(sampler, PROMPTS, by_length, SAMPLING, seed=3, iteration=4)
    drawn = sampler.generate(
        [prompt.ids for prompt in PROMPTS], SAMPLING, prompt_seeds(3, 4, range(len(PROMPTS)))
    )
    assert len(collected.rollouts) == len(drawn) == 6
    for index, (rollout, row) in enumerate(zip(collected.rollouts, drawn, strict=True)):
        assert rollout.prompt_ids.tolist() == list(PROMPTS[index // 2].ids)
        assert torch.equal(rollout.completion_ids, row.ids)
        assert torch.equal(rollout.sampler_logprobs, row.logprobs)
        assert (rollout.score, rollout.finished) == (len(row.ids), row.finished)
        assert rollout.sampling == SAMPLING
        assert rollout.old_logprobs is None


def test_the_reward_sees_completions_in_the_form_of_their_prompts_without_the_stop_token():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0] * len(prompts)

    words = {20: "no", 21: "maybe", EOS: "</s>"}
    rows = ([20, EOS], [20, 21], [21, EOS])
    collect(
        writes(*rows),
        PROMPTS,
        reward,
        Sampling(max_new_tokens=2, stop_ids=(EOS,)),
        decode=lambda ids: " ".join(words[i] for i in ids),
    )
    assert seen["prompts"] == ["yes?", CHAT, [8, 9, 10]]
    assert seen["completions"] == ["no", [{"role": "assistant", "content": "no maybe"}], [21, EOS]]
    assert seen["completion_ids"] == list(rows)
    assert seen["prompt_ids"] == [[5, 6], [7], [8, 9, 10]]
    assert seen["finished"] == [True, False, True]
    assert seen["answer"] == [1, None, None]
    assert seen["source"] == [None, "b", None]


def test_rows_without_a_reward_are_left_out_and_counted():
    def reward(prompts, completions, completion_ids, **columns):
        return [None if ids[0] == 20 else 0.0 for ids in completion_ids]

    collected = collect(
        writes([20], [21], [21]), PROMPTS, reward, Sampling(), asking=Asking(max_drop_frac=0.5)
    )
    assert [row.prompt_ids.tolist() for row in collected.rollouts] == [[7], [8, 9, 10]]
    assert collected.metrics["dropped"].value == pytest.approx(1 / 3)
    assert collected.metrics["score"].count == 2
    with pytest.raises(DataError, match="got none for 1 of 3: rows 0"):
        collect(writes([20], [21], [21]), PROMPTS, reward, Sampling())


def test_rewards_that_cannot_be_used_reach_nobody():
    with pytest.raises(NonFiniteError, match="rows 0"):
        collect(writes([20], [21], [21]), PROMPTS, lambda *_: [math.nan, 0.0, 0.0], Sampling())
    with pytest.raises(ZeroDivisionError):
        collect(writes([20], [21], [21]), PROMPTS, lambda *_: 1 / 0, Sampling())


def test_token_rewards_and_members_travel_with_the_row():
    token = lambda prompts, completions: [RewardOut(None, torch.ones(2), {"words": 3.0})] * 3  # noqa: E731
    collected = collect(writes([20, 21], [21, 20], [21, 21]), PROMPTS, token, Sampling())
    assert collected.rollouts[0].token_rewards.tolist() == [1.0, 1.0]
    assert collected.rollouts[0].score is None
    assert "score" not in collected.metrics
    assert collected.metrics["reward/words"].value == 3.0

    members = ensemble({"one": lambda p, c: [1.0] * 3, "two": lambda p, c: [4.0] * 3}, "min")
    collected = collect(writes([20], [21], [21]), PROMPTS, members, Sampling())
    assert collected.rollouts[0].score == 1.0
    assert collected.rollouts[0].info["two"] == 4.0
    assert collected.metrics["reward/two"].value == 4.0


def test_the_share_of_finished_rows_and_the_length_are_logged():
    stops = Sampling(max_new_tokens=3, stop_ids=(EOS,))
    collected = collect(writes([20, EOS], [21, 21, 21], [EOS]), PROMPTS, by_length, stops)
    assert collected.metrics["finished"].value == pytest.approx(2 / 3)
    assert collected.metrics["completion_tokens"].value == 2.0
    assert [row.info["stop_reason"] for row in collected.rollouts] == ["stop_id", "length", "stop_id"]


def test_no_penalty_is_applied_here():
    stops = Sampling(max_new_tokens=1, stop_ids=(EOS,))
    (row, *_) = collect(writes([20], [20], [20]), PROMPTS, lambda p, c: [0.0] * 3, stops).rollouts
    assert (row.score, row.finished) == (0.0, False)


def test_two_ranks_draw_what_one_would():
    sampler = TransformersSampler(tiny_model())
    whole = collect(sampler, PROMPTS, by_length, SAMPLING, seed=1, iteration=2).rollouts
    even = collect(sampler, PROMPTS[::2], by_length, SAMPLING, seed=1, iteration=2, places=[0, 2]).rollouts
    odd = collect(sampler, PROMPTS[1::2], by_length, SAMPLING, seed=1, iteration=2, places=[1]).rollouts
    ids = lambda rows: [row.completion_ids.tolist() for row in rows]  # noqa: E731
    assert ids(even[:2] + odd + even[2:]) == ids(whole)


def test_greedy_decoding_is_refused():
    with pytest.raises(ConfigError, match="got greedy decoding"):
        collect(writes(), PROMPTS, by_length, Sampling(temperature=0))


def test_top_p_without_logprobs_is_refused_before_the_reward_is_asked():
    """P7"""
    asked = []
    with pytest.raises(ConfigError, match=r"log-probabilities from the sampler with top_p=0\.9"):
        collect(writes([20], [21], [21]), PROMPTS, asked.append, Sampling(top_p=0.9))
    assert not asked
    sampler = TransformersSampler(tiny_model())
    assert len(collect(sampler, PROMPTS, by_length, Sampling(top_p=0.9)).rollouts) == 3


def test_a_sampler_that_loses_rows_is_refused():
    class Short:
        def generate(self, prompt_ids, sampling, seed):
            return [Sampled.of([20], sampling)]

    with pytest.raises(ShapeError, match="expected 3 completions from the sampler, got 1"):
        collect(Short(), PROMPTS, by_length, Sampling())


def test_a_column_by_a_reserved_name_is_refused():
    with pytest.raises(ConfigError, match=r"got \['finished'\]"):
        Prompt([5], columns={"finished": True})


def test_a_tokenizer_decodes_what_its_model_wrote():
    tokenizer = tiny()
    sampler = TransformersSampler(tiny_model(vocab_size=len(tokenizer)))
    texts = []

    def reward(prompts, completions, **columns):
        texts.extend(completions)
        return [0.0] * len(prompts)

    (row,) = collect(
        sampler, [Prompt([40], "x")], reward, Sampling(max_new_tokens=5), decode=tokenizer.decode
    ).rollouts
    assert texts == [tokenizer.decode(row.completion_ids)]
