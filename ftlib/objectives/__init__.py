"""Level 2: objectives, `(model, batch) -> LossOutput`. For any training loop."""

from ftlib.objectives.classification import Classification
from ftlib.objectives.cloze import Cloze
from ftlib.objectives.dpo import DPO, PairLoss
from ftlib.objectives.pairs import Pairs, pairs
from ftlib.objectives.ppo import PPO
from ftlib.objectives.protocol import Needs, Objective, OfOneForward, Prepared, Referring
from ftlib.objectives.reward import Reward
from ftlib.objectives.sft import SFT
from ftlib.objectives.weighted import Weighted, weighted

__all__ = [
    "DPO",
    "PPO",
    "SFT",
    "Classification",
    "Cloze",
    "Needs",
    "Objective",
    "OfOneForward",
    "PairLoss",
    "Pairs",
    "Prepared",
    "Referring",
    "Reward",
    "Weighted",
    "pairs",
    "weighted",
]
