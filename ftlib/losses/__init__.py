"""Level 1: losses as pure functions of tensors, one number per token, sequence or pair. torch only."""

from ftlib.losses.classification import binary_cross_entropy, class_weight_of, cross_entropy
from ftlib.losses.controllers import AdaptiveKL, FixedKL
from ftlib.losses.kl import check_kl_placement, kl_estimate, kl_exact
from ftlib.losses.likelihood import entropy, nll, token_logprobs
from ftlib.losses.masks import completion_mask, reduce
from ftlib.losses.moments import RunningMoments, explained_variance, whiten
from ftlib.losses.policy import policy_ratio, ppo_policy, ppo_value
from ftlib.losses.preference import bradley_terry, dpo, hinge, ipo, robust_dpo
from ftlib.losses.returns import gae, shape_rewards

__all__ = [
    "AdaptiveKL",
    "FixedKL",
    "RunningMoments",
    "binary_cross_entropy",
    "bradley_terry",
    "check_kl_placement",
    "class_weight_of",
    "completion_mask",
    "cross_entropy",
    "dpo",
    "entropy",
    "explained_variance",
    "gae",
    "hinge",
    "ipo",
    "kl_estimate",
    "kl_exact",
    "nll",
    "policy_ratio",
    "ppo_policy",
    "ppo_value",
    "reduce",
    "robust_dpo",
    "shape_rewards",
    "token_logprobs",
    "whiten",
]
