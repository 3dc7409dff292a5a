"""Export: what was trained, in the formats of peft and transformers, with a model card."""

from ftlib.export.card import CardData, describe_hardware
from ftlib.export.save import save

__all__ = ["CardData", "describe_hardware", "save"]
