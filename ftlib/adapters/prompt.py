"""Prompt tuning: trained embeddings before the text, through peft.

    model(P, e(x_1), ..., e(x_T)),   P in R^{n x d}

Source: Lester et al. 2021 (arXiv:2104.08691).
"""

from __future__ import annotations

from collections.abc import Sequence

from peft import PromptTuningConfig
from transformers import PreTrainedTokenizerBase

from ftlib.adapters.adapter import Adapter
from ftlib.adapters.capability import capabilities_of
from ftlib.adapters.soft import SoftStart, Start
from ftlib.adapters.tokens import with_new_tokens
from ftlib.checks import COUNT, TEXT, check, listed, one_of

__all__ = ["prompt"]


def prompt(
    tokens: int = 20,
    *,
    init: Start = "vocab",
    text: str | None = None,
    labels: Sequence[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    new_tokens: Sequence[int] | None = None,
) -> Adapter:
    """Train `tokens` embeddings before the text, and nothing else.

    Args:
        tokens: n, >= 1; 20 to 100 are usual. They count towards the model's context.
        init: what they start from. "text", the words of the task, learns soonest; "labels", the names of
            classes; "vocab", tokens drawn from the frequent ones; "random", N(0, 1), learns slowly.
        text: of "text"; repeated or cut to `tokens`, without special tokens.
        labels: of "labels".
        tokenizer: splits them; None takes the trainer's, or the one beside the model.
        new_tokens: ids of tokens whose rows of the embedding tables are trained too; see `lora`.

    Raises:
        ConfigError: a value out of range, or one without effect.

    Example:
        >>> prompt(8).capabilities.adds_positions
        8
    """
    check(
        "prompt",
        {
            "tokens": (tokens, COUNT),
            "init": (init, one_of(Start)),
            "text": (text, TEXT.or_none),
            "labels": (labels, listed("texts", TEXT.holds).or_none),
        },
    )
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)
    with_new_tokens(config, new_tokens, "prompt")
    start = SoftStart(init, text, tuple(labels or ()), tokenizer)
    return Adapter("prompt", config, capabilities_of(config), start)
