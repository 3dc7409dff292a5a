"""From rollouts to advantages: rewards, holes, cuts, whitening, what is refused.

The formulas themselves have their tests in `tests/losses`; here they meet rollouts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ftlib.batches import Sampling
from ftlib.errors import ConfigError, ShapeError
from ftlib.objectives import PPO
from tests.losses.test_moments import on_ranks
from tests.objectives.rollouts import column, drawn, rollout

PLAIN = {"whiten_advantages": False, "missing_stop_penalty": 0.0}
NEXT_ONLY = PLAIN | {"lam": 0.0}  # with values of zero, advantages are the rewards themselves
NAN = float("nan")


def advantages(*rollouts: Any, beta: float = 0.0, row: int = 0, **options: Any) -> torch.Tensor:
    return column(PPO(**options).prepare(rollouts, beta=beta), "advantages", row)


# -- rewards ----------------------------------------------------------------------------------------


def test_each_token_pays_for_its_kl_and_the_score_comes_with_the_last():
    """P1: beta .1, l = (.5, -.2, .1), score 1."""
    row = rollout(old=[-1.0, -1.0, -1.0], ref=[-1.5, -0.8, -1.1], score=1.0)
    assert_close(advantages(row, beta=0.1, **NEXT_ONLY), torch.tensor([-0.05, 0.02, 0.99]))


def test_the_score_lies_at_the_last_sampled_token():
    """P13: not at the tool's output after it."""
    row = rollout(score=1.0, mask=[1, 1, 0])
    assert_close(advantages(row, **NEXT_ONLY), torch.tensor([0.0, 1.0, 0.0]))


def test_copies_of_a_row_have_equal_numbers():
    """P13."""
    row = rollout(**drawn(0, 4), score=1.0)
    prepared = PPO().prepare([row] * 5 + [rollout(**drawn(1, 6), score=0.3)], beta=0.1)
    for name in ("advantages", "returns", "old_logprobs", "ref_logprobs", "old_values"):
        for copy in range(1, 5):
            assert torch.equal(column(prepared, name, copy), column(prepared, name, 0)), name


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_token_rewards_of_which_the_last_holds_all_are_the_score(lam):
    """P21."""
    numbers = drawn(0, 4)
    as_score = rollout(**numbers, score=0.7)
    as_tokens = rollout(**numbers, score=None, token_rewards=[0.0, 0.0, 0.0, 0.7])
    ours, theirs = (PPO(lam=lam).prepare([each], beta=0.2) for each in (as_score, as_tokens))
    for name in ("advantages", "returns"):
        assert torch.equal(column(ours, name), column(theirs, name))


@pytest.mark.parametrize("split", [(0.7, 0.0, 0.0), (0.2, 0.4, 0.1), (-1.0, 1.0, 0.7)])
def test_however_a_score_is_split_the_first_return_is_the_same(split):
    """P21, at gamma = lambda = 1."""
    numbers = drawn(0, 3)
    prepared = PPO(lam=1.0).prepare([rollout(**numbers, score=None, token_rewards=split)], beta=0.0)
    assert_close(column(prepared, "returns")[0], torch.tensor(0.7))


def test_scores_are_kept_within_their_bound():
    rows = [rollout(score=score) for score in (-30.0, 4.0, 30.0)]
    prepared = PPO(score_clip=10.0, **NEXT_ONLY).prepare(rows, beta=0.0)
    assert [float(column(prepared, "advantages", row)[-1]) for row in range(3)] == [-10.0, 4.0, 10.0]


# -- completions that did not end ----------------------------------------------------------------------

CUT = {"values": [0.2, 0.2, 0.2], "end_value": 0.4, "finished": False}


@pytest.mark.parametrize(("truncation", "last"), [("terminal", -0.2), ("bootstrap", 0.2)])
def test_a_cut_counts_as_the_end_or_as_what_the_critic_says_of_it(truncation, last):
    """P13: V = .2 thrice, V of the state after the cut .4, score 0."""
    found = advantages(rollout(**CUT), truncation=truncation, **PLAIN)
    assert_close(found[-1], torch.tensor(last))


def test_a_cut_row_may_be_left_out_of_loss_and_moments():
    """P13: the others are whitened as if it were not there."""
    ended = [rollout(**drawn(0, 3), score=1.0), rollout(**drawn(1, 4), score=0.0)]
    cut = rollout(**drawn(2, 5), score=9.0, finished=False, end_value=3.0)
    ours = PPO(truncation="mask").prepare([ended[0], cut, ended[1]], beta=0.1)
    theirs = PPO().prepare(ended, beta=0.1)
    assert column(ours, "continuation_weights", 1).tolist() == [0.0] * 5
    for place, other in ((0, 0), (2, 1)):
        assert_close(column(ours, "advantages", place), column(theirs, "advantages", other))


def test_a_finished_row_needs_no_value_of_its_end():
    finished = rollout(values=[0.2, 0.2, 0.2], end_value=0.4)
    assert_close(advantages(finished, truncation="bootstrap", **PLAIN)[-1], torch.tensor(-0.2))


def test_a_missing_stop_costs_its_penalty_or_has_a_score_of_its_own():
    """P13; a token-level reward is lowered too."""
    cut, ended = rollout(score=0.7, finished=False), rollout(score=0.7)
    in_tokens = rollout(score=None, token_rewards=[0.5, 0.0, 0.2], finished=False)

    def last(row: Any, **options: Any) -> float:
        return float(advantages(row, **(NEXT_ONLY | options))[-1])

    assert last(cut, missing_stop_penalty=1.5) == pytest.approx(-0.8)
    assert last(in_tokens, missing_stop_penalty=1.5) == pytest.approx(0.2 - 1.5)
    assert last(cut, missing_stop_penalty=1.5, missing_stop_score=-2.0) == pytest.approx(-2.0)
    assert last(ended, missing_stop_penalty=1.5, missing_stop_score=-2.0) == pytest.approx(0.7)


def test_bootstrap_without_a_value_of_the_end_is_refused_by_row():
    rows = [rollout(), rollout(finished=False)]
    with pytest.raises(ShapeError, match=r"expected end_value.*got none in \[1\]"):
        PPO(truncation="bootstrap").prepare(rows, beta=0.0)


# -- advantages and returns ----------------------------------------------------------------------------


def test_returns_are_taken_before_whitening():
    """P1: V = .2, score 1, lambda .95: A = (.722, .76, .8) and R = A + V."""
    row = rollout(values=[0.2] * 3, score=1.0)
    raw = torch.tensor([0.722, 0.76, 0.8])
    assert_close(advantages(row, **PLAIN), raw)
    white = PPO().prepare([row], beta=0.0)
    assert_close(column(white, "returns"), raw + 0.2)
    assert_close(column(white, "advantages"), (raw - raw.mean()) / raw.std())


def test_time_does_not_pass_in_a_hole():
    """P12: mask 1100011, V = .5, 1 at the end."""
    row = rollout(old=[-1.0] * 7, values=[0.5] * 7, mask=[1, 1, 0, 0, 0, 1, 1], score=1.0)
    found = advantages(row, **PLAIN)
    assert_close(found, torch.tensor([0.4287, 0.4512, 0.0, 0.0, 0.0, 0.475, 0.5]), rtol=0, atol=5e-5)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("truncation", ["terminal", "bootstrap"])
def test_any_mask_gives_what_the_compacted_rows_give(lam, truncation):
    """P12, with the penalty per token and a cut at the end."""
    options = {"lam": lam, "truncation": truncation}
    generator = torch.Generator().manual_seed(0)
    holed, compact, masks = [], [], []
    for seed in range(6):
        numbers, mask = drawn(seed, 8), torch.rand(8, generator=generator) < 0.6
        mask[seed] = True
        ended = {"score": float(seed), "finished": seed % 2 == 0, "end_value": 0.3}
        holed.append(rollout(**numbers, mask=mask.tolist(), **ended))
        compact.append(rollout(**{name: each[mask] for name, each in numbers.items()}, **ended))
        masks.append(mask)
    ours, theirs = (PPO(**options).prepare(rows, beta=0.3) for rows in (holed, compact))
    for row, mask in enumerate(masks):
        for name in ("advantages", "returns"):
            assert_close(column(ours, name, row)[mask], column(theirs, name, row))
    for name, mean in theirs.metrics.items():
        assert_close(ours.metrics[name].value, mean.value, msg=name)


def test_whitening_is_over_all_rows_at_once():
    """P1: 1, 2 and 3, 4; the mean of rewards stays."""
    rows = [rollout(old=[-1.0] * 2, score=None, token_rewards=pair) for pair in ([1.0, 2.0], [3.0, 4.0])]

    def found(**options: Any) -> torch.Tensor:
        prepared = PPO(lam=0.0, **options).prepare(rows, beta=0.0)
        return torch.cat([column(prepared, "advantages", row) for row in range(2)])

    assert_close(found(), torch.tensor([-1.1619, -0.3873, 0.3873, 1.1619]), rtol=0, atol=5e-5)
    kept = found(whiten_advantages=False, whiten_rewards=True)
    assert_close(kept, torch.tensor([1.3381, 2.1127, 2.8873, 3.6619]), rtol=0, atol=5e-5)


@pytest.mark.parametrize("whiten", ["whiten_advantages", "whiten_rewards"])
def test_ranks_together_prepare_as_one_would(whiten):
    """P11: shares of unequal size, unequal lengths, one row that counts for nothing."""
    rows = [
        rollout(**drawn(seed, 2 + seed), score=float(seed), finished=seed != 3, end_value=0.0)
        for seed in range(6)
    ]
    options = {"whiten_advantages": False, "truncation": "mask"} | {whiten: True}
    whole = PPO(**options).prepare(rows, beta=0.1)
    parts = on_ranks(
        lambda part, reduce: PPO(**options).prepare(part, beta=0.1, reduce=reduce), [rows[:2], rows[2:]]
    )
    found = [row for part in parts for row in part.rows]
    for row, expected in zip(found, whole.rows, strict=True):
        for name in ("advantages", "returns"):
            assert_close(row[name][0], expected[name][0])


def test_the_critic_may_have_its_own_decay():
    numbers = drawn(0, 5)
    both = PPO(lam=0.9, lam_value=1.0, **PLAIN).prepare([rollout(**numbers, score=1.0)], beta=0.0)
    alone = PPO(lam=1.0, **PLAIN).prepare([rollout(**numbers, score=1.0)], beta=0.0)
    policy = PPO(lam=0.9, **PLAIN).prepare([rollout(**numbers, score=1.0)], beta=0.0)
    assert_close(column(both, "returns"), column(alone, "returns"))
    assert_close(column(both, "advantages"), column(policy, "advantages"))


def test_what_lies_where_nothing_was_sampled_changes_nothing():
    """P2: NaN and infinity in a hole."""
    numbers = drawn(0, 5)
    mask = torch.tensor([1, 0, 1, 1, 0]).bool()
    names = {**numbers, "token_rewards": torch.ones(5), "sampler": numbers["old"]}
    for junk in (NAN, float("inf"), 7.0):
        spoilt = {name: torch.where(mask, each, torch.full_like(each, junk)) for name, each in names.items()}
        clean, dirty = (
            PPO().prepare([rollout(**each, mask=mask.tolist(), sampling=Sampling(top_p=0.9))], beta=0.2)
            for each in (names, spoilt)
        )
        for name in ("advantages", "returns", "importance", "old_values", "old_logprobs"):
            assert torch.equal(column(clean, name)[mask], column(dirty, name)[mask]), name
        for name, mean in clean.metrics.items():
            assert torch.equal(mean.sum, dirty.metrics[name].sum), name


# -- a sampler whose distribution was cut ---------------------------------------------------------------


def test_a_warped_sampler_is_corrected_for_up_to_twice():
    """Weights min(2, exp(log pi_old - log mu)), at the tokens that count."""
    old, mu = [-1.0, -1.0, -3.0], [-1.0, -0.5, -0.5]
    warped = rollout(old=old, sampler=mu, sampling=Sampling(top_p=0.9))
    found = column(PPO().prepare([warped], beta=0.0), "importance")
    assert_close(found, torch.tensor([0.0, -0.5, -2.5]).exp())
    likelier = rollout(old=mu, sampler=old, sampling=Sampling(top_k=4))
    found = column(PPO().prepare([likelier], beta=0.0), "importance")
    assert_close(found, torch.tensor([1.0, math.exp(0.5), 2.0]))


def test_a_plain_sampler_is_not_corrected_for():
    """Its log-probabilities differ from the trainer's by rounding alone."""
    row = rollout(old=[-1.0, -1.0], sampler=[-1.1, -0.9])
    assert column(PPO().prepare([row], beta=0.0), "importance").tolist() == [1.0, 1.0]


# -- what is told, and what is refused -------------------------------------------------------------------


def test_kl_is_told_per_sequence_and_advantages_per_token():
    rows = [rollout(old=[-1.0] * 2, ref=[-1.5] * 2, score=1.0), rollout(old=[-1.0], ref=[-2.0], score=0.0)]
    metrics = PPO().prepare(rows, beta=0.1).metrics
    told = {name: (float(mean.sum), float(mean.count)) for name, mean in metrics.items()}
    assert told["kl"] == pytest.approx((2.0, 2))
    assert told["completion_tokens"] == (3, 2)
    assert told["score"] == (1.0, 2)
    assert told["shaped_reward"] == pytest.approx((1.0 - 0.2, 2))
    assert told["return"][1] == told["advantage"][1] == 3
    k3 = 2 * (torch.tensor(-0.5).exp() - 0.5) + torch.tensor(-1.0).exp()
    assert told["kl_k3"] == pytest.approx((float(k3), 2))


def test_what_a_rollout_lacks_is_said():
    complete = rollout()
    with pytest.raises(ShapeError, match="at least one rollout"):
        PPO().prepare([], beta=0.0)
    with pytest.raises(ShapeError, match=r"old_logprobs in every rollout, got none in \[1\]"):
        PPO().prepare([complete, replace(complete, old_logprobs=None)], beta=0.0)
    without = replace(complete, ref_logprobs=None)
    with pytest.raises(ConfigError, match=r"ref_logprobs for a KL penalty of 0\.1"):
        PPO().prepare([complete, without], beta=0.1)
    assert float(PPO().prepare([without], beta=0.0).metrics["kl"].sum) == 0.0


def test_a_rows_numbers_before_whitening_are_its_own():
    """P13: whatever it is padded with."""
    rows = [rollout(**drawn(seed, 1 + 2 * seed), score=1.0) for seed in range(4)]
    together = PPO(whiten_advantages=False).prepare(rows, beta=0.1)
    for index, row in enumerate(rows):
        alone = PPO(whiten_advantages=False).prepare([row], beta=0.1)
        for name in ("advantages", "returns"):
            assert torch.equal(column(together, name, index), column(alone, name))
