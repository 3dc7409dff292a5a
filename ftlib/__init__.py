"""ftlib: fine-tune language models and align them with preferences, in code you can take apart.

Importing this imports neither torch nor transformers; a name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ftlib import adapters, losses, models, objectives, rollouts
    from ftlib.data import (
        Encoder,
        collate,
        decontaminate,
        deduplicate,
        few_shot_split,
        formatters,
        load_records,
        load_report,
        mix,
        prepare,
        split,
        to_trl,
        transforms,
    )
    from ftlib.engine import PPOConfig, TrainConfig
    from ftlib.evaluation import compare, plots
    from ftlib.models import demo_model, forward, load
    from ftlib.rollouts import rewards
    from ftlib.rollouts.rewards import RewardOut
    from ftlib.trainers import (
        ClassificationTrainer,
        DPOTrainer,
        PPOTrainer,
        RewardTrainer,
        SFTTrainer,
        TrainResult,
    )

_PLACES = {
    "ClassificationTrainer": "ftlib.trainers",
    "DPOTrainer": "ftlib.trainers",
    "Encoder": "ftlib.data",
    "PPOConfig": "ftlib.engine",
    "PPOTrainer": "ftlib.trainers",
    "RewardOut": "ftlib.rollouts.rewards",
    "RewardTrainer": "ftlib.trainers",
    "SFTTrainer": "ftlib.trainers",
    "TrainConfig": "ftlib.engine",
    "TrainResult": "ftlib.trainers",
    "collate": "ftlib.data",
    "compare": "ftlib.evaluation",
    "decontaminate": "ftlib.data",
    "deduplicate": "ftlib.data",
    "demo_model": "ftlib.models",
    "few_shot_split": "ftlib.data",
    "formatters": "ftlib.data",
    "forward": "ftlib.models",
    "load": "ftlib.models",
    "load_records": "ftlib.data",
    "load_report": "ftlib.data",
    "mix": "ftlib.data",
    "plots": "ftlib.evaluation",
    "prepare": "ftlib.data",
    "rewards": "ftlib.rollouts",
    "split": "ftlib.data",
    "to_trl": "ftlib.data",
    "transforms": "ftlib.data",
}
_PACKAGES = ("adapters", "losses", "models", "objectives", "rollouts")

__all__ = [
    "ClassificationTrainer",
    "DPOTrainer",
    "Encoder",
    "PPOConfig",
    "PPOTrainer",
    "RewardOut",
    "RewardTrainer",
    "SFTTrainer",
    "TrainConfig",
    "TrainResult",
    "adapters",
    "collate",
    "compare",
    "decontaminate",
    "deduplicate",
    "demo_model",
    "few_shot_split",
    "formatters",
    "forward",
    "load",
    "load_records",
    "load_report",
    "losses",
    "mix",
    "models",
    "objectives",
    "plots",
    "prepare",
    "rewards",
    "rollouts",
    "split",
    "to_trl",
    "transforms",
]

logging.getLogger(__name__).addHandler(logging.NullHandler())
# Where bitsandbytes is installed, whoever imports peft reads an advice to download kernels: not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "kernels-community" not in str(record.msg)
)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"ftlib.{name}")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'ftlib' has no attribute {name!r}. There are {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
