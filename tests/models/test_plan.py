"""Which path a model takes, why, and that finding out leaves no trace."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ftlib.adapters import attach, lora
from ftlib.errors import CapabilityError
from ftlib.models.forward import forward
from ftlib.models.plan import plan_for
from tests.models_zoo import ARCHITECTURES, VOCAB, WEIGHT_STD, WINDOW, tiny_config, tiny_model
from tests.packed import own_logprobs, random_batch, random_groups

SMALL: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER: dict[str, Any] = SMALL | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
SCALED_BY_4 = {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}
# model type -> settings, and a word of the reason for the padded path (None: grouped)
OTHERS: dict[str, tuple[dict[str, Any], str | None]] = {
    "falcon": (SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}, "bypasses"),
    "bloom": (SMALL | {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "bypasses"),
    "mamba": (SMALL | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, "bypasses"),
    "minimax": (DECODER | {"num_local_experts": 2}, "linear_attention"),
    "phimoe": (DECODER | {"num_local_experts": 2, "sliding_window": WINDOW}, "sliding window"),
    "gpt_oss": (DECODER | {"num_local_experts": 4, "head_dim": 8}, "s_aux"),
    "cohere": (DECODER | {"logit_scale": 0.3}, None),
    "granite": (DECODER | SCALED_BY_4, None),
    "phi3": (DECODER | {"sliding_window": WINDOW}, None),
    "smollm3": (DECODER, None),
    "olmo2": (DECODER, None),
}


def other_model(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny random model of a kind that the zoo does not hold."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**OTHERS[kind][0])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name and "ln_" not in name and "layernorm" not in name:
                weight.add_(WEIGHT_STD * torch.randn(weight.shape))
    return model.eval()


@pytest.mark.parametrize("kind", list(OTHERS))
def test_the_path_of_other_architectures_is_declared_and_right(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, word = other_model(kind), OTHERS[kind][1]
    with caplog.at_level(logging.INFO, logger="ftlib.models.plan"):
        plan = plan_for(model)
    assert plan.path == ("grouped" if word is None else "padded")
    assert (word or "equal to the model's own logits") in plan.reason
    said = [record.getMessage() for record in caplog.records if record.name == "ftlib.models.plan"]
    assert said == [f"{type(model).__name__} takes the {plan.path} path: {plan.reason}"]
    with torch.no_grad():
        own, scored = own_logprobs(model, random_groups()), forward(model, random_batch(), hidden=True)
    assert_close(scored.logprobs_N, own.logprobs_N, rtol=1e-5, atol=1e-5)
    assert_close(scored.last_CD, own.last_CD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_promised_architectures_take_the_grouped_path_in_half_precision(
    arch: str, dtype: torch.dtype
) -> None:
    assert plan_for(tiny_model(arch).to(dtype)).path == "grouped"


def test_a_model_that_cannot_be_grouped_is_told_so() -> None:
    model = other_model("falcon")
    with pytest.raises(
        CapabilityError, match=r"got FalconModel: its attention bypasses .* Leave `path` alone"
    ):
        forward(model, random_batch(), path="grouped")


def test_a_model_without_a_head_is_refused() -> None:
    model = AutoModel.from_config(tiny_config("llama"))
    with pytest.raises(CapabilityError, match="got LlamaModel"):
        forward(model, random_batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_changed_after_the_head_are_refused_in_any_dtype(dtype: torch.dtype) -> None:
    """A factor of 1.1 that no setting declares."""
    model = tiny_model().to(dtype)
    model.register_forward_hook(lambda _, __, output: output.__setitem__("logits", output.logits * 1.1))
    with pytest.raises(CapabilityError, match="linear head on the last hidden state, got LlamaForCausalLM"):
        plan_for(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_changed_after_the_head_are_refused_in_any_dtype(dtype: torch.dtype) -> None:
    model = tiny_model(auto=AutoModelForSequenceClassification, num_labels=2).to(dtype)
    model.score.float()
    model.register_forward_hook(lambda _, __, output: output.__setitem__("logits", output.logits * 1.1))
    with pytest.raises(CapabilityError, match="got LlamaForSequenceClassification, whose own scores differ"):
        plan_for(model)


@pytest.mark.parametrize("pad", [None, 5, 26, 54], ids=["none", "first", "last", "last of the other row"])
def test_the_check_of_scores_depends_on_no_pad_id(pad: int | None) -> None:
    """26 and 54 end the two rows that are tried; a zero head scores all rows alike."""
    model = tiny_model(auto=AutoModelForSequenceClassification, num_labels=1, pad_token_id=pad)
    assert plan_for(model).path == "grouped"
    torch.nn.init.zeros_(model.score.weight)
    assert plan_for(copy.deepcopy(model)).path == "grouped"
    assert not model.score._forward_pre_hooks


def test_the_check_leaves_modes_random_state_and_configuration_alone() -> None:
    model = attach(tiny_model("gemma2", attention_dropout=0.5), lora(r=2, dropout=0.5)).train()
    model.get_base_model().model.layers[0].eval()
    config, modes = copy.deepcopy(model.config.to_dict()), [part.training for part in model.modules()]
    names = (model.config._attn_implementation, model.training)
    before = torch.get_rng_state()
    plan_for(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in model.modules()] == modes
    assert (model.config._attn_implementation, model.training) == names
    assert model.config.to_dict() == config
    assert all(weight.grad is None for weight in model.parameters())


def test_the_check_is_exact_inside_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert plan_for(tiny_model()).path == "grouped"


def test_the_check_runs_once_for_a_model() -> None:
    model, calls = tiny_model(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        plan_for(model)
    assert len(calls) == 1
