"""Adapter factories over peft. Each returns an `Adapter`: a peft configuration and what it can do."""

from ftlib.adapters.adapter import Adapter
from ftlib.adapters.attach import attach, load_adapter, merge, model_capabilities
from ftlib.adapters.capability import Capabilities, capabilities_of
from ftlib.adapters.combine import combine
from ftlib.adapters.full import full
from ftlib.adapters.ia3 import ia3
from ftlib.adapters.lora import lora
from ftlib.adapters.p_tuning import p_tuning
from ftlib.adapters.prefix import prefix
from ftlib.adapters.prompt import prompt
from ftlib.adapters.stack import stack

__all__ = [
    "Adapter",
    "Capabilities",
    "attach",
    "capabilities_of",
    "combine",
    "full",
    "ia3",
    "load_adapter",
    "lora",
    "merge",
    "model_capabilities",
    "p_tuning",
    "prefix",
    "prompt",
    "stack",
]
