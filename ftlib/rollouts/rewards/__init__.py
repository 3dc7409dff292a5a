"""Rewards: the protocol, asking for them with care, and several as one."""

from ftlib.rollouts.rewards.ensemble import ensemble
from ftlib.rollouts.rewards.protocol import Item, Reward, RewardOut
from ftlib.rollouts.rewards.values import Asking, reward_rows

__all__ = ["Asking", "Item", "Reward", "RewardOut", "ensemble", "reward_rows"]
