"""Score and value heads: a language model's body under a new head becomes a reward model, a classifier or a
critic.

    score = w h_last,   w ~ N(0, 1 / (d + 1)),   in float32 whatever the body's dtype

It is the class that transformers has for sequence classification, so saving, adapters and plain loading
are transformers' and peft's own. Its config carries a pad id that no row ends in (`padding.py`).

Source of the initialisation: Stiennon et al. 2020 (arXiv:2009.01325), appendix B.

Shapes: D hidden width, K scores of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from ftlib.adapters.quantised import adopt_quantisation
from ftlib.adapters.task import SCORE, score_head
from ftlib.errors import CapabilityError, ConfigError
from ftlib.models.padding import choose_pad_id
from ftlib.models.parts import inner_model, require_decoder

__all__ = [
    "as_reward_model",
    "choose_padding",
    "describe_score",
    "new_score_head",
    "new_value_head",
    "restore_score",
    "with_score_head",
]

AnyModel = PreTrainedModel | PeftModel


def as_reward_model(model: AnyModel, tokenizer: PreTrainedTokenizerBase | None = None) -> AnyModel:
    """A model with one score, on the body of a language model.

    The body is shared, not copied: training the result trains the language model's body too, and an
    adapter on it is an adapter on both.

    Args:
        model: a plain language model, which keeps its own config; or a reward model, with or without
            adapters, which is returned as it is.
        tokenizer: to choose the pad id from, for plain transformers; None leaves the model's own, or none
            where rows end in that one.

    Returns:
        Transformers' model for sequence classification. The head's weights come from torch's global
        generator of the CPU, so a seed fixes them on every device.

    Raises:
        CapabilityError: a language model with adapters, an encoder-decoder, or one that transformers has no
            such class for.
        ConfigError: a model with several labels.
    """
    require_decoder(model, "as_reward_model")
    inner = inner_model(model)
    if score_head(inner) is not None:
        _require_one_score(inner)
        return model
    reward = with_score_head(model, tokenizer)
    describe_score(reward)
    return reward


def with_score_head(
    model: AnyModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    scores: int = 1,
    what: str = "as_reward_model",
) -> PreTrainedModel:
    """Transformers' class for sequence classification on a plain language model's own body, with a new head.

    Args:
        model: see `as_reward_model`.
        tokenizer: see `as_reward_model`.
        scores: K, outputs of the head.
        what: who asks, for messages.

    Raises:
        CapabilityError: see `as_reward_model`.
    """
    inner = inner_model(model)
    if isinstance(model, PeftModel):
        raise CapabilityError(
            f"{what}: expected a plain language model, got one with the adapters "
            f"{sorted(model.peft_config)}. A new adapter goes to the trainer, adapter=; a trained one is "
            "folded in first: ftlib.adapters.merge(model)."
        )
    made = _shell(inner, scores, what)
    setattr(made, made.base_model_prefix, inner.base_model)
    adopt_quantisation(made, inner)
    width = cast(nn.Linear, score_head(made)).in_features
    head = new_score_head(width, scores).to(inner.device)
    setattr(made, SCORE, head)
    made.training = head.training = inner.training
    choose_padding(made, choose_pad_id(inner, tokenizer))
    return made


def new_value_head(width: int) -> nn.Linear:
    """Linear(D, 1), float32, all zeros: at first every state has the value 0.

    It reads the policy's last hidden states; `Scorer` holds it.
    """
    head = nn.Linear(width, 1, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def new_score_head(width: int, scores: int = 1) -> nn.Linear:
    """Linear(D, K) without bias, float32, its weights drawn from N(0, 1 / (D + 1))."""
    head = nn.Linear(width, scores, bias=False, device="meta", dtype=torch.float32).to_empty(device="cpu")
    nn.init.normal_(head.weight, std=(width + 1) ** -0.5)
    return head


def describe_score(reward: PreTrainedModel) -> None:
    """Say in the config of a reward model that its one output is a score."""
    config = reward.config
    config.id2label, config.label2id = {0: "score"}, {"score": 0}
    config.problem_type = "regression"  # pipelines then give the score itself, not its sigmoid


def choose_padding(model: PreTrainedModel, pad: int | None) -> None:
    """Say in the config of a decoder with a score head what it pads with."""
    model.config.get_text_config(decoder=True).pad_token_id = pad


def restore_score(reward: PreTrainedModel, files: Iterable[Path]) -> None:
    """Put the score head back as it was saved, in float32; transformers reads every weight in one dtype.

    Args:
        reward: a model just read from the files.
        files: safetensors of its weights.

    Raises:
        CapabilityError: it has no score head.
    """
    head = score_head(reward)
    if head is None:
        raise CapabilityError(
            f"reward model: expected a decoder with a head named {SCORE!r}, got {type(reward).__name__}. "
            "Give the language model it was made from."
        )
    head.float()
    saved = {f"{SCORE}.{name}": weight for name, weight in head.named_parameters()}
    for file in files:
        with safe_open(file, framework="pt") as weights, torch.no_grad():
            for name in saved.keys() & set(weights.keys()):
                found = weights.get_tensor(name)
                if found.shape == saved[name].shape:  # else it is of another number of classes, and new here
                    saved[name].copy_(found)


def _require_one_score(model: PreTrainedModel) -> None:
    """Raise `ConfigError` unless the model gives one score to a row."""
    if model.config.num_labels != 1:
        raise ConfigError(
            f"reward model: expected one score, got a classifier of {model.config.num_labels} labels. "
            "Give the language model it was made from."
        )


def _shell(inner: PreTrainedModel, scores: int, what: str) -> PreTrainedModel:
    """The class for sequence classification of a language model, without weights."""
    config = deepcopy(inner.config)
    config.num_labels = scores
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise CapabilityError(
            f"{what}: expected an architecture with a class for sequence classification in "
            f"transformers, got {type(inner).__name__}. Nearest: Llama, Qwen, Mistral, Gemma, GPT-2, OPT."
        )
    with torch.device("meta"):
        made = cast(type[PreTrainedModel], MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)])(config)
    if score_head(made) is None or type(made.base_model) is not type(inner.base_model):
        raise CapabilityError(
            f"{what}: expected a class for sequence classification with a head named {SCORE!r} on "
            f"{type(inner.base_model).__name__}, got {type(made).__name__}. Give another architecture."
        )
    return made
