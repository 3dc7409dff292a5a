"""Level 1: losses as pure functions of tensors, one number per token, sequence or pair. torch only."""

from ftlib.losses.likelihood import entropy, nll, token_logprobs

__all__ = ["entropy", "nll", "token_logprobs"]
