"""Binding an adapter, folding it in, saving it for plain peft, loading it again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from ftlib.adapters import (
    Adapter,
    attach,
    full,
    ia3,
    load_adapter,
    lora,
    merge,
    model_capabilities,
    prefix,
    prompt,
)
from ftlib.adapters.fused import FusedLoraLinear
from ftlib.errors import CapabilityError, CheckpointError, ConfigError
from ftlib.export.save import save_weights
from ftlib.models import forward
from ftlib.models.load import load
from tests.models_zoo import ARCHITECTURES, tiny_model
from tests.packed import random_batch

IDS_BL = torch.arange(3, 13)[None]
BATCH = random_batch()
# peft 0.21 reads a property of models by the name it had before transformers 5.23
plain_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
VARIANTS = {
    "LoRA": lora(r=4),
    "rsLoRA": lora(r=4, rslora=True),
    "DoRA": lora(r=4, dora=True),
    "whole modules": lora(r=4, modules_to_save=["lm_head"]),
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS_BL).logits  # type: ignore[no-any-return]


def trained(adapter: Adapter | LoraConfig, *, name: str = "default", arch: str = "llama") -> PeftModel:
    """A few steps of plain descent, large enough to be seen."""
    model = attach(tiny_model(arch), adapter, name=name).train()
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.02)
    for _ in range(3):
        loss = -(BATCH.weights_N * forward(model, BATCH).logprobs_N).sum() / BATCH.weights_N.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model  # type: ignore[return-value]


def test_the_users_configuration_is_left_alone() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    before = copy.deepcopy(config)
    model = attach(tiny_model("gpt2"), LoraConfig(r=2, target_modules=["c_attn"]))
    model = attach(tiny_model(), config)
    assert config == before
    assert config._custom_modules is None
    assert model.peft_config["default"] is not config


@pytest.mark.parametrize("name", ["default", "policy", "a name with spaces"])
def test_any_name_serves(name: str, tmp_path: Path) -> None:
    model = trained(lora(r=2), name=name)
    assert list(model.peft_config) == [name]
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    again = attach(tiny_model(), folder, name="reader")
    assert_close(logits(again), logits(model), rtol=0, atol=1e-6)


def test_a_second_adapter_becomes_the_trained_one_and_the_first_returns() -> None:
    model = trained(lora(r=2), name="first")
    before = logits(model)
    assert attach(model, lora(r=3), name="second") is model
    assert model.active_adapters == ["second"]
    assert {name.split(".")[-2] for name, x in model.named_parameters() if x.requires_grad} == {"second"}
    assert_close(logits(model), logits(tiny_model()), rtol=0, atol=1e-5)
    model.set_adapter("first")
    assert torch.equal(logits(model), before)


def test_a_taken_name_and_full_training_over_adapters_are_refused() -> None:
    model = attach(tiny_model(), lora(r=2))
    with pytest.raises(ConfigError, match=r"got 'default'. Taken: \['default'\]"):
        attach(model, lora(r=2))
    with pytest.raises(CapabilityError, match="Merge them first"):
        attach(model, full())


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_training_moves_the_adapter_and_no_bit_of_the_base(variant: str) -> None:
    base = tiny_model().state_dict()
    model = trained(VARIANTS[variant])
    fresh = attach(tiny_model(), VARIANTS[variant])
    own = model.get_base_model().state_dict()
    for name, value in base.items():
        parts = name.rsplit(".", 1)
        found = [own[key] for key in (name, f"{parts[0]}.base_layer.{parts[1]}") if key in own]
        found += [own[key] for key in [f"{parts[0]}.original_module.{parts[1]}"] if key in own]
        assert len(found) == 1, name
        assert torch.equal(found[0], value), name
    starts = dict(fresh.named_parameters())
    moved = {
        name: not torch.equal(x, starts[name]) for name, x in model.named_parameters() if x.requires_grad
    }
    assert all(moved[name] for name in moved if "lora_A" not in name)  # A draws at random, unlike in `fresh`
    assert moved


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_merged_logits_are_equal_on_every_architecture(arch: str) -> None:
    model = trained(lora(r=4), arch=arch)
    expected = logits(model)
    merged = merge(model)
    assert type(merged) is type(tiny_model(arch))
    assert not any("lora" in name for name, _ in merged.named_modules())
    assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert float((expected - logits(tiny_model(arch))).abs().max()) > 1e-3


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_merged_logits_are_equal_for_every_variant(variant: str) -> None:
    model = trained(VARIANTS[variant])
    expected = logits(model)
    assert_close(logits(merge(model)), expected, rtol=1e-5, atol=1e-5)


def test_a_plain_model_merges_to_itself() -> None:
    model = tiny_model()
    assert merge(model) is model


@plain_peft
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_saved_adapter_is_plain_peft(variant: str, tmp_path: Path) -> None:
    model = trained(VARIANTS[variant])
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    assert not any(isinstance(module, FusedLoraLinear) for module in plain.modules())
    assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}
    assert "ftlib" not in json.dumps(json.loads((tmp_path / "adapter_config.json").read_text()))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_saved_adapter_trains_on_after_loading(variant: str, tmp_path: Path) -> None:
    model = trained(VARIANTS[variant])
    model.save_pretrained(tmp_path)
    again = attach(tiny_model(), str(tmp_path))
    assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    assert {name for name, x in again.named_parameters() if x.requires_grad} == {
        name for name, x in model.named_parameters() if x.requires_grad
    }
    fused = any(isinstance(module, FusedLoraLinear) for module in again.modules())
    assert fused == (variant != "DoRA")


def test_an_adapter_loads_frozen_beside_another(tmp_path: Path) -> None:
    saved = trained(lora(r=2))
    saved.save_pretrained(tmp_path)
    model = attach(tiny_model(), lora(r=3), name="other")
    load_adapter(model, tmp_path, name="saved", trainable=False)
    assert_close(logits(model), logits(saved), rtol=0, atol=1e-6)
    assert not any(x.requires_grad for name, x in model.named_parameters() if ".saved." in name)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(task_type="CAUSAL_LM"),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], bias="lora_only", task_type="CAUSAL_LM"),
    ],
    ids=["IA3", "LoRA with biases"],
)
def test_any_peft_configuration_trains_grouped(config: Any) -> None:
    model = trained(config, arch="qwen2")
    assert model_capabilities(model).groupable
    grouped, padded = (forward(model, BATCH, path=path).logprobs_N for path in ("grouped", "padded"))  # type: ignore[arg-type]
    assert_close(grouped, padded, rtol=1e-5, atol=1e-5)
    assert float((logits(model) - logits(tiny_model("qwen2"))).abs().max()) > 1e-3


def loaded(model: Any, folder: Path) -> Any:
    """By the way of `ftlib.load`."""
    return load(model, adapter=folder)


def hostile(folder: Path, **changes: Any) -> Path:
    """A saved adapter whose configuration was tampered with."""
    trained(lora(r=2)).save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 10**6}, r"r: expected at most \d+, .* got 1000000"),
        ({"auto_mapping": {"parent_library": "os.path"}}, r"parent_library: .* got 'os.path'"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "'auto_map'"),
        ({"r": "many"}, r"r: expected at most \d+, .* got 'many'"),
        ({"rank_pattern": {"q_proj": 1e99}}, r"r: expected at most \d+, .* got 1e\+99"),
        ({"peft_type": "XLORA", "adapters": {"0": "org/other"}}, "peft_type: .* got 'XLORA'"),
        ({"peft_type": None}, "peft_type: .* got None"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "got 'megatron_config'"),
        ({"layer_replication": [[0, 10**9]]}, "got 'layer_replication'"),
        ({"hooks": "x.Y"}, "expected settings of peft's LORA, got 'hooks'"),
        ({"auto_mapping": "x"}, r"parent_library: .* got 'x'"),
        ({"trainable_token_indices": {"model.embed_tokens": ["x"]}}, "expected ids of tokens"),
        ({"trainable_token_indices": {"model.embed_tokens": [10**9]}}, "within twice the 97 rows"),
    ],
)
@pytest.mark.parametrize("use", [attach, load_adapter, loaded])
def test_a_hostile_folder_is_refused_by_its_key_and_the_model_stays(
    use: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, folder = tiny_model(), hostile(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        use(model, folder)
    assert model.state_dict().keys() == tiny_model().state_dict().keys()


@pytest.mark.parametrize(
    ("adapter", "changes", "message"),
    [
        (prompt(4), {"num_virtual_tokens": 10**9}, r"num_virtual_tokens: expected at most \d+"),
        (prompt(4), {"token_dim": 10**9}, r"token_dim: expected at most \d+"),
        (prefix(4), {"num_layers": 60}, r"2 num_layers token_dim: expected at most \d+, .* got \d+"),
    ],
)
def test_virtual_tokens_larger_than_their_weights_are_refused(
    adapter: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    attach(tiny_model(), adapter).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        attach(tiny_model(), tmp_path)


def test_rows_of_new_tokens_are_looked_at_too(tmp_path: Path) -> None:
    save_weights(tmp_path, attach(tiny_model(), ia3(new_tokens=[5])))
    attach(tiny_model(), tmp_path)
    path = tmp_path / "new_tokens" / "adapter_model.safetensors"
    rows = {name: value * float("nan") for name, value in load_file(path).items()}
    save_file(rows, path)
    with pytest.raises(CheckpointError, match=r"new_tokens.*expected finite values"):
        attach(tiny_model(), tmp_path)
    save_weights(tmp_path / "new_tokens", trained(lora(r=2)))
    with pytest.raises(ConfigError, match="peft_type: expected one of TRAINABLE_TOKENS, got 'LORA'"):
        attach(tiny_model(), tmp_path)


def test_a_setting_of_a_newer_peft_that_is_off_is_no_reason_to_refuse(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['use_later'\]"):
        attach(tiny_model(), hostile(tmp_path, use_later=False))


def test_pickled_and_non_finite_weights_are_refused(tmp_path: Path) -> None:
    folder = hostile(tmp_path)
    weights = load_file(folder / "adapter_model.safetensors")
    torch.save(weights, folder / "adapter_model.bin")
    name = sorted(weights)[0]
    weights[name][0, 0] = float("inf")
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}: expected finite values"):
        attach(tiny_model(), str(folder))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"Pickles \(.bin\) are not read"):
        attach(tiny_model(), str(folder))


def test_a_hub_name_is_no_folder() -> None:
    with pytest.raises(ConfigError, match=r"no adapter_config.json in org/adapter"):
        attach(tiny_model(), "org/adapter")


def test_an_adapter_with_a_head_is_refused_by_a_language_model() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    with pytest.raises(CapabilityError, match="got the language model LlamaForCausalLM"):
        attach(tiny_model(), config)
