"""LoRA as declared: its size, its scale, its start, and what it says of itself."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError

import pytest
import torch
from peft import IA3Config, LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from ftlib.adapters import Adapter, attach, capabilities_of, full, lora
from ftlib.adapters.lora import LoraInit
from ftlib.errors import ConfigError
from tests.models_zoo import ARCHITECTURES, tiny_model

IDS_BL = torch.arange(3, 13)[None]


def trainable(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS_BL).logits  # type: ignore[no-any-return]


def test_llama_trains_r_times_in_plus_out_of_its_seven_matrices() -> None:
    """A layer: q and o 32 + 32, k and v 32 + 16, gate, up and down 32 + 64 each; 512 in all; two layers."""
    assert trainable(attach(tiny_model(), lora(r=4))) == 2 * 4 * 512


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_linear_layer_but_the_head_is_adapted(arch: str) -> None:
    model = tiny_model(arch)
    head = model.get_output_embeddings()
    sizes = [
        sum(module.weight.shape)
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    assert len(sizes) >= 8
    assert trainable(attach(model, lora(r=3))) == 3 * sum(sizes)


def test_dora_also_trains_one_magnitude_per_output() -> None:
    """Outputs of a layer: 32 + 16 + 16 + 32 + 64 + 64 + 32 = 256."""
    assert trainable(attach(tiny_model(), lora(r=4, dora=True))) == 2 * (4 * 512 + 256)


@pytest.mark.parametrize(
    ("adapter", "scale"),
    [
        (lora(r=4), 2.0),
        (lora(r=4, alpha=4), 1.0),
        (lora(r=4, alpha=6.0), 1.5),
        (lora(r=4, alpha=6, rslora=True), 3.0),
    ],
    ids=["2 r / r", "alpha / r", "a float", "alpha / sqrt r"],
)
def test_the_scale_is_alpha_over_r_or_its_root(adapter: Adapter, scale: float) -> None:
    layers = [module for module in attach(tiny_model(), adapter).modules() if isinstance(module, LoraLayer)]
    assert [layer.scaling["default"] for layer in layers] == [scale] * 14


def test_targets_are_names_or_one_regular_expression() -> None:
    by_name = trainable(attach(tiny_model(), lora(r=4, targets=["q_proj", "v_proj"])))
    assert by_name == 2 * 4 * (32 + 32 + 32 + 16)
    assert trainable(attach(tiny_model(), lora(r=4, targets=r".*\.1\.self_attn\.[qv]_proj"))) == by_name // 2


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_is_the_identity(init: LoraInit, dora: bool) -> None:
    adapter = lora(r=4, init=init, dora=dora)
    assert adapter.capabilities.identity_init
    expected = logits(tiny_model())
    assert_close(logits(attach(tiny_model(), adapter).eval()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["default", "pissa", "olora"])
def test_switched_off_is_the_base_where_declared_and_only_there(init: LoraInit) -> None:
    adapter, expected = lora(r=4, init=init), logits(tiny_model())
    model = attach(tiny_model(), adapter).eval()
    with model.disable_adapter():
        found = logits(model)
    assert adapter.capabilities.off_is_base == torch.equal(found, expected)


@pytest.mark.parametrize(
    ("config", "identity", "off_is_base"),
    [
        (LoraConfig(), True, True),
        (LoraConfig(init_lora_weights=False), False, True),
        (LoraConfig(bias="all"), True, False),
        (LoraConfig(init_lora_weights="pissa_niter_4"), True, False),
        (LoraConfig(init_lora_weights="olora"), True, False),
        (IA3Config(), True, True),
    ],
    ids=["plain", "random", "biases", "pissa", "olora", "ia3"],
)
def test_what_a_peft_configuration_promises(config: LoraConfig, identity: bool, off_is_base: bool) -> None:
    capabilities = capabilities_of(config)
    assert (capabilities.identity_init, capabilities.off_is_base) == (identity, off_is_base)
    assert capabilities.groupable


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "lora: r: expected a whole number >= 1, got 0"),
        ({"dropout": 1.0}, "dropout: expected a number >= 0 and < 1, got 1.0"),
        ({"init": "corda"}, "got 'corda'"),
        ({"init": "orthogonal", "r": 3}, "even rank .* got 3. Take r=4"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        lora(**options)  # type: ignore[arg-type]


def test_an_adapter_is_a_frozen_declaration_that_serves_many_models() -> None:
    adapter = lora(r=2)
    before = copy.deepcopy(adapter.config)
    for arch in ("llama", "gpt2"):
        attach(tiny_model(arch), adapter, name="any")
    assert adapter.config == before
    with pytest.raises(FrozenInstanceError):
        adapter.kind = "other"  # type: ignore[misc]


def test_full_trains_every_weight_of_the_model_itself() -> None:
    model = tiny_model().requires_grad_(False)
    assert attach(model, full()) is model
    assert trainable(model) == sum(weight.numel() for weight in model.parameters())
    assert not full().capabilities.off_is_base
