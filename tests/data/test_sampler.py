from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlib.data.sampler import StepSampler, balance, pack
from ftlib.errors import ConfigError

LENGTHS = st.lists(st.integers(0, 50), max_size=30)


@given(size=st.integers(1, 40), batch_size=st.integers(1, 12), seed=st.integers(0, 5))
def test_an_epoch_visits_every_example_once_and_batches_never_cross_it(size, batch_size, seed):
    sampler = StepSampler(size, batch_size=batch_size, seed=seed)
    for _ in range(2):
        batches = [sampler.next_batch() for _ in range(sampler.steps_per_epoch)]
        assert sorted(i for batch in batches for i in batch) == list(range(size))
        assert all(len(batch) == batch_size for batch in batches[:-1])
    assert sampler.state_dict() == {"epoch": 2, "offset": 0}


@given(stop=st.integers(0, 12))
def test_resumed_equals_uninterrupted(stop):
    whole = StepSampler(10, batch_size=3, seed=7)
    for _ in range(stop):
        whole.next_batch()
    resumed = StepSampler(10, batch_size=3, seed=7)
    resumed.load_state_dict(whole.state_dict())
    assert [whole.next_batch() for _ in range(6)] == [resumed.next_batch() for _ in range(6)]


def test_epochs_and_seeds_differ_in_order():
    sampler = StepSampler(50, batch_size=50, seed=0)
    first, second = sampler.next_batch(), sampler.next_batch()
    assert first != second
    assert StepSampler(50, batch_size=50, seed=1).next_batch() != first


def test_without_shuffling_the_order_is_that_of_the_data():
    assert StepSampler(5, batch_size=5, shuffle=False).next_batch() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("hash_seed", ["0", "9"])
def test_the_order_does_not_depend_on_the_hash_seed(hash_seed):
    code = (
        "from ftlib.data.sampler import StepSampler; "
        "print(StepSampler(20, batch_size=20, seed=3).next_batch())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ".", "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out.strip() == str(StepSampler(20, batch_size=20, seed=3).next_batch())


@pytest.mark.parametrize("state", [{"epoch": 0}, {"epoch": 0, "offset": 10}, {"epoch": -1, "offset": 0}])
def test_a_state_of_other_data_is_refused(state):
    with pytest.raises(ConfigError, match="StepSampler: expected"):
        StepSampler(10, batch_size=2).load_state_dict(state)


def test_sizes_below_one_are_refused():
    with pytest.raises(ConfigError, match="size >= 1, got 0"):
        StepSampler(0, batch_size=1)
    with pytest.raises(ConfigError, match="max_tokens >= 1"):
        pack([1], 0)
    with pytest.raises(ConfigError, match="ranks >= 1"):
        balance([1], 0)


@given(lengths=LENGTHS, room=st.integers(1, 60))
def test_packing_keeps_every_item_once_and_overfills_only_with_a_single_item(lengths, room):
    packed = pack(lengths, room)
    assert sorted(i for members in packed for i in members) == list(range(len(lengths)))
    for members in packed:
        assert len(members) == 1 or sum(lengths[i] for i in members) <= room


def test_best_fit_takes_the_tightest_room():
    """7 and 5 open two bins with rooms 3 and 5; 3 fills the first exactly although both have room."""
    assert pack([7, 5, 3], 10) == [[0, 2], [1]]


@given(lengths=LENGTHS, ranks=st.integers(1, 6))
def test_dealing_keeps_every_item_once_and_the_gap_below_one_item(lengths, ranks):
    """Longest first: when the last item of the fullest rank was dealt, that rank had the fewest tokens."""
    dealt = balance(lengths, ranks)
    assert sorted(i for members in dealt for i in members) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in members) for members in dealt]
    assert max(sums) - min(sums) <= max(lengths, default=0)
