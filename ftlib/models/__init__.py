"""Models: loading, the one forward, grouped attention, the heads, and roles on one model."""

from ftlib.models.candidates import score
from ftlib.models.demo_model import demo_model
from ftlib.models.forward import Scorer, forward
from ftlib.models.heads import as_reward_model
from ftlib.models.load import load
from ftlib.models.masked import Masking
from ftlib.models.references import (
    AdapterOff,
    Cached,
    FrozenCopy,
    KeptReference,
    Reference,
    Snapshot,
    make_reference,
)
from ftlib.models.roles import adapters_active, adapters_off, swapped_weights
from ftlib.models.scoring import Scored
from ftlib.models.sharing import on_same_base
from ftlib.models.soft_tokens import add_soft_tokens

__all__ = [
    "AdapterOff",
    "Cached",
    "FrozenCopy",
    "KeptReference",
    "Masking",
    "Reference",
    "Scored",
    "Scorer",
    "Snapshot",
    "adapters_active",
    "adapters_off",
    "add_soft_tokens",
    "as_reward_model",
    "demo_model",
    "forward",
    "load",
    "make_reference",
    "on_same_base",
    "score",
    "swapped_weights",
]
