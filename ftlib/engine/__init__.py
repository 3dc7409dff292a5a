"""The engine under the trainers: configuration, one exact step, checkpoints, callbacks, scopes."""

from ftlib.engine.config import TrainConfig
from ftlib.engine.engine import Engine, StepResult, Stopped
from ftlib.engine.ppo_config import PPOConfig

__all__ = ["Engine", "PPOConfig", "StepResult", "Stopped", "TrainConfig"]
