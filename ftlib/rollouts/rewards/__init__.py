"""Rewards: the protocol, asking for them with care, several as one, models and judges."""

from ftlib.rollouts.rewards.ensemble import ensemble
from ftlib.rollouts.rewards.judge import Judge, PairJudge
from ftlib.rollouts.rewards.model import reward_model
from ftlib.rollouts.rewards.protocol import Item, Reward, RewardOut
from ftlib.rollouts.rewards.values import Asking, reward_rows

__all__ = [
    "Asking",
    "Item",
    "Judge",
    "PairJudge",
    "Reward",
    "RewardOut",
    "ensemble",
    "reward_model",
    "reward_rows",
]
