"""IA3: which matrices it finds, what it trains, and that it leaves queries alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel
from peft.tuners.ia3 import IA3Layer
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ftlib.adapters import attach, ia3, load_adapter, merge, model_capabilities
from ftlib.adapters.slices import SlicedIA3Linear, keys_and_values
from ftlib.engine import TrainConfig
from ftlib.errors import CapabilityError, ConfigError
from ftlib.models import adapters_off, forward
from ftlib.trainers import SFTTrainer
from tests.models_zoo import ARCHITECTURES, tiny_model
from tests.packed import random_batch
from tests.trainers.tiny import rows

BATCH = random_batch()
IDS_BL = torch.arange(3, 13)[None]
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (AutoModelForMaskedLM, SMALL),
    "roberta": (AutoModelForMaskedLM, SMALL),
    "modernbert": (AutoModelForMaskedLM, SMALL | {"cls_token_id": 3, "sep_token_id": 4}),
    "deberta-v2": (AutoModelForMaskedLM, SMALL),
    "smollm3": (AutoModelForCausalLM, SMALL | {"num_key_value_heads": 2}),
    "phi3": (AutoModelForCausalLM, SMALL | {"num_key_value_heads": 2}),
    "t5": (
        AutoModelForSeq2SeqLM,
        {"vocab_size": 97, "d_model": 32, "d_kv": 6, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    ),
}
# What each architecture calls its keys and values, or the matrix that fuses them; then its down-projection.
NAMES: dict[str, tuple[set[str], set[str]]] = {
    "llama": ({"k_proj", "v_proj"}, {"down_proj"}),
    "qwen2": ({"k_proj", "v_proj"}, {"down_proj"}),
    "qwen3": ({"k_proj", "v_proj"}, {"down_proj"}),
    "mistral": ({"k_proj", "v_proj"}, {"down_proj"}),
    "gemma2": ({"k_proj", "v_proj"}, {"down_proj"}),
    "gemma3_text": ({"k_proj", "v_proj"}, {"down_proj"}),
    "gpt2": ({"c_attn"}, {"mlp.c_proj"}),
    "opt": ({"k_proj", "v_proj"}, {"fc2"}),
    "gpt_neox": ({"query_key_value"}, {"dense_4h_to_h"}),
    "phi": ({"k_proj", "v_proj"}, {"fc2"}),
    "bert": ({"key", "value"}, {"0.output.dense", "1.output.dense"}),
    "roberta": ({"key", "value"}, {"0.output.dense", "1.output.dense"}),
    "modernbert": ({"Wqkv"}, {"mlp.Wo"}),
    "deberta-v2": ({"key_proj", "value_proj"}, {"0.output.dense", "1.output.dense"}),
    "smollm3": ({"k_proj", "v_proj"}, {"down_proj"}),
    "phi3": ({"qkv_proj"}, {"down_proj"}),
    "t5": ({"k", "v"}, {"wo"}),
}
FUSED = ["gpt2", "gpt_neox", "phi3", "modernbert"]


def model_of(arch: str) -> PreTrainedModel:
    if arch in ARCHITECTURES:
        return tiny_model(arch)
    auto, settings = OTHERS[arch]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = auto.from_config(CONFIG_MAPPING[arch](**settings))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(10)  # as in the zoo: wrong attention then shows
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    arguments = {"input_ids": IDS_BL}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = IDS_BL
    with torch.no_grad():
        return model.eval()(**arguments).logits  # type: ignore[no-any-return]


def trained(arch: str = "llama") -> PeftModel:
    """Two steps of plain descent, large enough to be seen, away from vectors of ones."""
    model = attach(model_of(arch), ia3())
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):
        output = model.train()(input_ids=IDS_BL, labels=IDS_BL)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return model.eval()  # type: ignore[return-value]


@pytest.mark.parametrize("arch", NAMES)
def test_it_finds_keys_values_and_down_projections_and_nothing_else(arch: str) -> None:
    config = attach(model_of(arch), ia3()).peft_config["default"]  # type: ignore[union-attr]
    attention, downs = NAMES[arch]
    assert set(config.target_modules) == attention | downs
    assert set(config.feedforward_modules) == downs


@pytest.mark.parametrize("arch", NAMES)
def test_a_fresh_one_is_the_identity_and_switched_off_is_the_base(arch: str) -> None:
    expected = logits(model_of(arch))
    model = attach(model_of(arch), ia3())
    assert model_capabilities(model).identity_init
    assert_close(logits(model), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ia3_l" in name:
                weight.uniform_(0.5, 1.5)
    assert float((logits(model) - expected).abs().max()) > 1e-3
    with adapters_off(model):
        assert torch.equal(logits(model), expected)


def test_llama_trains_two_widths_of_keys_and_one_of_the_feed_forward_block_per_layer() -> None:
    """L (2 kv + f) with two layers, two key-value heads of eight, and f = 64."""
    model = attach(tiny_model(), ia3())
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == 2 * (2 * 16 + 64)


@pytest.mark.parametrize("arch", FUSED)
def test_of_a_fused_matrix_the_queries_are_neither_scaled_nor_trained(arch: str) -> None:
    model = trained(arch)
    fused = [layer for layer in model.modules() if isinstance(layer, SlicedIA3Linear)]
    assert len(fused) == 2
    for layer in fused:
        vector_O = layer.ia3_l["default"].detach().flatten()
        assert torch.equal(vector_O[~layer.trained_O], torch.ones(32)), "queries: four heads of eight"
        assert (vector_O[layer.trained_O] != 1).float().mean() > 0.9


def test_the_slices_of_a_fused_matrix_are_where_the_architecture_puts_them() -> None:
    """GPT-2 lays queries, keys and values one after another; GPT-NeoX head by head."""
    queries_first = keys_and_values(tiny_model("gpt2"), "transformer.h.0.attn.c_attn")
    assert torch.equal(queries_first, torch.arange(96) >= 32)
    by_head = keys_and_values(tiny_model("gpt_neox"), "gpt_neox.layers.0.attention.query_key_value")
    assert torch.equal(by_head, torch.arange(96) % 24 >= 8)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "phi3"])
def test_a_saved_one_is_plain_peft_and_trains_on_here(arch: str, tmp_path: Path) -> None:
    model = trained(arch)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(model_of(arch), str(tmp_path))
    assert_close(logits(plain), logits(model), rtol=0, atol=1e-6)
    again = load_adapter(model_of(arch), tmp_path)
    assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    kinds = [type(each) for each in model.modules() if isinstance(each, IA3Layer)]
    assert [type(each) for each in again.modules() if isinstance(each, IA3Layer)] == kinds


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "gpt_neox", "phi3"])
def test_merged_logits_are_equal(arch: str) -> None:
    model = trained(arch)
    expected = logits(model)
    assert float((expected - logits(model_of(arch))).abs().max()) > 1e-3
    assert_close(logits(merge(model)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox"])
def test_grouped_is_padded(arch: str) -> None:
    model = trained(arch)
    gradients = []
    for path in ("grouped", "padded"):
        model.zero_grad()
        forward(model, BATCH, path=path).logprobs_N.sum().backward()  # type: ignore[arg-type]
        gradients.append([x.grad.clone() for x in model.parameters() if x.grad is not None])
    assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


def test_weight_decay_does_not_pull_scales_towards_zero() -> None:
    """A step without a gradient would take 10 per cent off every vector of ones."""
    config = TrainConfig(progress="off", weight_decay=1.0, learning_rate=0.1, max_steps=1, batch_size=2)
    zero = [row | {"continuation_weights": [[0.0] * len(row["continuation_ids"][0])]} for row in rows(2)]
    trainer = SFTTrainer(tiny_model("gpt2"), zero, adapter=ia3(), config=config)
    trainer.train()
    scales = [weight for name, weight in trainer.model.named_parameters() if "ia3_l" in name]
    assert len(scales) == 4
    assert all(bool((weight == 1).all()) for weight in scales)


def test_named_targets_scale_the_input_of_down_projections_and_the_output_of_the_rest() -> None:
    model = attach(tiny_model(), ia3(targets=["v_proj", "down_proj"]))
    layers = {name.split(".")[-1]: each for name, each in model.named_modules() if isinstance(each, IA3Layer)}
    assert {name: each.is_feedforward for name, each in layers.items()} == {
        "v_proj": False,
        "down_proj": True,
    }
    by_pattern = attach(tiny_model(), ia3(targets=r".*\.1\.self_attn\.v_proj"))
    assert sum(weight.numel() for weight in by_pattern.parameters() if weight.requires_grad) == 16


def test_a_configuration_of_pefts_own_without_targets_is_completed_the_same_way() -> None:
    """peft's table would scale the queries of Qwen2."""
    config = IA3Config(task_type="CAUSAL_LM")
    model = attach(tiny_model("qwen2"), config)
    assert model.peft_config["default"].target_modules == ["down_proj", "k_proj", "v_proj"]  # type: ignore[union-attr]
    assert config.target_modules is None


def test_a_model_whose_experts_are_no_linear_layers_is_refused_by_name() -> None:
    settings = SMALL | {"num_key_value_heads": 2, "num_local_experts": 2}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["mixtral"](**settings))
    with pytest.raises(CapabilityError, match="MixtralForCausalLM, found no down-projections"):
        attach(model, ia3())


def test_no_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ia3: targets: expected 'auto', .*got \[\]"):
        ia3(targets=[])
