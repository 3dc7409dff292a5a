"""Level 2: objectives, `(model, batch) -> LossOutput`. For any training loop."""

from ftlib.objectives.protocol import Objective
from ftlib.objectives.sft import SFT

__all__ = ["SFT", "Objective"]
