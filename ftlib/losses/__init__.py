"""Level 1: losses as pure functions of tensors, one number per token, sequence or pair. torch only."""

from ftlib.losses.likelihood import entropy, nll, token_logprobs
from ftlib.losses.preference import bradley_terry, dpo, hinge, ipo, robust_dpo

__all__ = ["bradley_terry", "dpo", "entropy", "hinge", "ipo", "nll", "robust_dpo", "token_logprobs"]
