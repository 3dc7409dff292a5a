"""Rollouts: completions drawn from a policy, and what they are worth."""

from ftlib.batches import Rollout, Sampling
from ftlib.rollouts import rewards
from ftlib.rollouts.agreement import sampler_agreement
from ftlib.rollouts.collect import Collected, Prompt, collect
from ftlib.rollouts.sampler import FunctionSampler, Sampled, Sampler, prompt_seeds
from ftlib.rollouts.transformers_sampler import TransformersSampler
from ftlib.rollouts.vllm_sampler import VLLMSampler

__all__ = [
    "Collected",
    "FunctionSampler",
    "Prompt",
    "Rollout",
    "Sampled",
    "Sampler",
    "Sampling",
    "TransformersSampler",
    "VLLMSampler",
    "collect",
    "prompt_seeds",
    "rewards",
    "sampler_agreement",
]
