"""P-tuning: embeddings before the text that a small encoder computes, through peft.

    P = MLP(BiLSTM(E))   or   P = MLP(E),   E in R^{n x d}

Trained are E and the encoder; saved for others is P, which is all a forward needs.

Source: Liu et al. 2021 (arXiv:2103.10385), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from peft import PromptEncoderConfig

from ftlib.adapters.adapter import Adapter
from ftlib.adapters.capability import capabilities_of
from ftlib.adapters.tokens import with_new_tokens
from ftlib.checks import COUNT, check, one_of

__all__ = ["Encoder", "p_tuning"]

Encoder = Literal["lstm", "mlp"]


def p_tuning(
    tokens: int = 20,
    *,
    encoder: Encoder = "lstm",
    hidden: int | None = None,
    new_tokens: Sequence[int] | None = None,
) -> Adapter:
    """Train an encoder of `tokens` embeddings before the text.

    Args:
        tokens: n, >= 1. They count towards the model's context.
        encoder: "lstm": two bidirectional layers and two linear ones; "mlp": three linear layers.
        hidden: the encoder's width, >= 1; None takes d, the width of the embeddings. The paper's LSTM has
            d / 2.
        new_tokens: ids of tokens whose rows of the embedding tables are trained too; see `lora`.

    Raises:
        ConfigError: a value out of range.

    Example:
        >>> p_tuning(8, encoder="mlp").capabilities.learning_rate
        0.001
    """
    check(
        "p_tuning",
        {"tokens": (tokens, COUNT), "encoder": (encoder, one_of(Encoder)), "hidden": (hidden, COUNT.or_none)},
    )
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=tokens,
        encoder_reparameterization_type=encoder.upper(),
        encoder_hidden_size=hidden,  # type: ignore[arg-type]  # None: peft takes the width of the tokens
    )
    with_new_tokens(config, new_tokens, "p_tuning")
    return Adapter("p_tuning", config, capabilities_of(config))
