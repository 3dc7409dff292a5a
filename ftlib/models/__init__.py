"""Models: loading, the one forward, grouped attention and the log-probability head."""

from ftlib.models.demo_model import demo_model
from ftlib.models.forward import Scorer, forward
from ftlib.models.heads import as_reward_model
from ftlib.models.load import load
from ftlib.models.scoring import Scored

__all__ = ["Scored", "Scorer", "as_reward_model", "demo_model", "forward", "load"]
