"""The engine under the trainers: configuration, one exact step, checkpoints, callbacks, scopes."""

from ftlib.engine.config import TrainConfig
from ftlib.engine.engine import Engine, StepResult, Stopped

__all__ = ["Engine", "StepResult", "Stopped", "TrainConfig"]
