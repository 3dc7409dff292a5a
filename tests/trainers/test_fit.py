"""The peak learning rate that a trainer takes where the settings leave it open."""

from __future__ import annotations

from typing import Any

import pytest

from ftlib.adapters import full, ia3
from ftlib.trainers import DPOTrainer, RewardTrainer
from tests.trainers.ppo_tiny import ppo
from tests.trainers.preferences import preference_trainer
from tests.virtual import SOFT


def rate(trainer: Any) -> float:
    [peak] = {group["lr"] for group in trainer.engine.optimizer.param_groups}
    assert peak == trainer.learning_rate
    return float(peak)


@pytest.mark.parametrize(
    ("kind", "adapter", "expected"),
    [
        (RewardTrainer, "lora", 2e-4),
        (RewardTrainer, full(), 2e-5),
        (DPOTrainer, "lora", 4e-5),
        (DPOTrainer, full(), 4e-6),
        (DPOTrainer, ia3(), 6e-4),
        (DPOTrainer, SOFT["prompt"](), SOFT["prompt"]().capabilities.learning_rate),
    ],
)
def test_each_preference_trainer_has_its_own_rate_for_each_adapter(kind: Any, adapter: Any, expected: float):
    """A fifth of the supervised rate for DPO; virtual tokens learn at one rate under any loss."""
    options = {"schedule": "constant", "reference": "snapshot"} if kind is DPOTrainer else {}
    assert rate(preference_trainer(kind, adapter=adapter, learning_rate=None, **options)) == expected


def test_a_rate_of_the_settings_is_taken_as_it_is():
    assert rate(preference_trainer(DPOTrainer, learning_rate=2e-4)) == 2e-4


@pytest.mark.parametrize(("adapter", "expected"), [("lora", 4e-5), (full(), 4e-6)])
def test_ppo_starts_from_a_fifth_of_the_supervised_rate_and_its_critic_from_five_times_that(
    adapter: Any, expected: float
):
    groups = ppo(adapter=adapter, learning_rate=None).engine.optimizer.param_groups
    assert sorted({group["lr"] for group in groups}) == [expected, pytest.approx(5 * expected)]
