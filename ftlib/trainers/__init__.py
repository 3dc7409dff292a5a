"""Level 3: trainers, loops one can read top to bottom."""

from ftlib.trainers.base import Trainer
from ftlib.trainers.classification import ClassificationTrainer
from ftlib.trainers.dpo import DPOTrainer
from ftlib.trainers.ppo import PPOTrainer
from ftlib.trainers.result import TrainResult
from ftlib.trainers.reward import RewardTrainer
from ftlib.trainers.sft import SFTTrainer

__all__ = [
    "ClassificationTrainer",
    "DPOTrainer",
    "PPOTrainer",
    "RewardTrainer",
    "SFTTrainer",
    "TrainResult",
    "Trainer",
]
