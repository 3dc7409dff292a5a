"""Virtual tokens with LoRA or IA3 beneath: what is trained, switched, saved, and what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig
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
    p_tuning,
    prefix,
    prompt,
    stack,
)
from ftlib.adapters.fused import FusedLoraLinear
from ftlib.adapters.stacked import beneath
from ftlib.errors import CapabilityError, CheckpointError, ConfigError
from ftlib.export import CardData, save
from ftlib.export.save import save_weights
from ftlib.models import adapters_off, as_reward_model, forward
from ftlib.models.adapted import active_adapters, is_identity, own_rates, why_not_off
from ftlib.trainers.identity import adapter_settings
from tests.models_zoo import tiny_model
from tests.packed import random_batch
from tests.trainers.preferences import moved
from tests.trainers.runs import assert_same, run, stop_after
from tests.trainers.tiny import sft

N = 4
IDS_1L = torch.arange(5, 14)[None]
BATCH = random_batch()
STACKS: dict[str, Callable[[], Adapter]] = {
    "prompt on lora": lambda: stack(prompt(N), lora(4)),
    "p-tuning on ia3": lambda: stack(ia3(), p_tuning(N, encoder="mlp")),
    "prefix on lora": lambda: stack(prefix(N), lora(4)),
}
every = pytest.mark.parametrize("kind", STACKS)


def stacked(kind: str = "prompt on lora", *, name: str = "default", shell: Any = None, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = tiny_model() if shell is None else shell(tiny_model())
    return attach(model, STACKS[kind](), name=name)


def logprobs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return forward(model.eval(), BATCH, path="padded").logprobs_N


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS_1L).logits  # type: ignore[no-any-return]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


# -- what is trained -----------------------------------------------------------------------------------


@every
def test_both_are_trained_in_float32_on_a_bfloat16_base(kind: str) -> None:
    """As many weights as the two train apart."""
    parts = STACKS[kind]()
    assert parts.beneath is not None
    alone = [attach(tiny_model(), config) for config in (parts.config, parts.beneath.config)]  # type: ignore[arg-type]
    model = attach(tiny_model().to(torch.bfloat16), parts)
    found = trained(model)
    assert {weight.dtype for weight in found.values()} == {torch.float32}
    assert sum(w.numel() for w in found.values()) == sum(
        w.numel() for each in alone for w in trained(each).values()
    )
    assert forward(model, BATCH).logprobs_N.isfinite().all()


@every
def test_every_weight_of_both_gets_a_gradient(kind: str) -> None:
    model = moved(stacked(kind))
    forward(model, BATCH).logprobs_N.sum().backward()
    assert any("lora_" in name or "ia3_" in name for name in trained(model))
    assert all(weight.grad is not None and weight.grad.any() for weight in trained(model).values())


def test_a_fresh_stack_says_what_its_virtual_tokens_say_alone() -> None:
    """LoRA starts as the identity, so nothing but the prompt acts."""
    torch.manual_seed(0)
    weights = prompt(N, init="random")
    alone = attach(tiny_model(), weights)
    model = attach(tiny_model(), stack(weights, lora(4)))
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(
            alone.prompt_encoder["default"].embedding.weight
        )
    assert_close(logprobs(model), logprobs(alone), rtol=0, atol=1e-6)


def test_the_projection_beneath_is_still_one_function() -> None:
    model = stacked()
    layers = [each for each in model.modules() if isinstance(each, FusedLoraLinear)]
    assert len(layers) == 14
    x = torch.ones(2, layers[0].in_features)
    assert all(layer._fusable(x, (), {}) == "default" for layer in layers if layer.in_features == x.shape[1])


def test_each_learns_at_its_own_default_rate() -> None:
    trainer = sft(adapter=stack(prompt(N), lora(4)), learning_rate=None, max_steps=1, schedule="constant")
    rates = {id(w): group["lr"] for group in trainer.engine.optimizer.param_groups for w in group["params"]}
    found = {name: rates[id(weight)] for name, weight in trainer.engine.masters.named.items()}
    assert {rate for name, rate in found.items() if "prompt_encoder" in name} == {5e-3}
    assert {rate for name, rate in found.items() if "lora_" in name} == {2e-4}
    assert trainer.train().history[0]["learning_rate"] == 2e-4


def test_a_rate_that_is_given_is_that_of_both() -> None:
    trainer = sft(adapter=stack(prefix(N), ia3()), learning_rate=1e-3)
    assert {group["lr"] for group in trainer.engine.optimizer.param_groups} == {1e-3}
    assert own_rates(trainer.model)  # which the settings override


# -- what it can do ------------------------------------------------------------------------------------


def test_it_can_do_what_both_can() -> None:
    can = stack(prompt(N), lora(4)).capabilities
    assert (can.adds_positions, can.virtual_tokens, can.groupable, can.checkpointable) == (N, N, True, True)
    assert (can.mergeable, can.identity_init, can.off_is_base) == (False, False, True)
    assert not stack(prefix(N), lora(4)).capabilities.groupable
    assert not stack(prompt(N), lora(4, init="pissa")).capabilities.off_is_base


@every
def test_the_model_declares_what_the_adapter_does(kind: str) -> None:
    assert model_capabilities(stacked(kind)) == STACKS[kind]().capabilities


@every
def test_switched_off_both_are_off(kind: str) -> None:
    expected = logprobs(tiny_model())
    model = moved(stacked(kind))
    assert active_adapters(model) == ("default",)
    assert not is_identity(model)
    with adapters_off(model):
        assert active_adapters(model) == ()
        assert torch.equal(logprobs(model), expected)
    assert float((logprobs(model) - expected).abs().max()) > 1e-3


def test_over_a_base_that_was_changed_off_is_not_the_base() -> None:
    model = attach(tiny_model(), stack(prompt(N), lora(4, init="pissa")))
    assert "off_is_base" in str(why_not_off(model))


def test_it_is_not_folded_in() -> None:
    with pytest.raises(CapabilityError, match="merge: expected an adapter that adds to weights"):
        merge(stacked())


def test_new_tokens_and_whole_modules_of_either_are_those_of_both() -> None:
    adapter = stack(lora(4, new_tokens=[5], modules_to_save=["norm"]), prompt(N, new_tokens=[7]))
    model = attach(tiny_model(), adapter)
    names = list(trained(model))
    assert any("norm.modules_to_save" in name for name in names)
    assert all(w.shape[0] == 2 for name, w in trained(model).items() if "trainable_tokens_delta" in name)
    assert any("trainable_tokens_delta" in name for name in names)


def test_a_module_that_is_trained_whole_has_no_layers_beneath() -> None:
    whole = PromptTuningConfig(num_virtual_tokens=N, modules_to_save=["up_proj"])
    names = list(trained(attach(tiny_model(), stack(whole, lora(4)))))
    assert any("up_proj.modules_to_save" in name for name in names)
    assert not any("up_proj" in name and "lora_" in name for name in names)


# -- what cannot be ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (prompt(N), prefix(N), "one of two sets of virtual tokens would not be read"),
        (lora(4), ia3(), "the first one merged"),
        (full(), prompt(N), "leaves none frozen"),
        (stack(prompt(N), lora(4)), ia3(), "a stack has two levels"),
        (prompt(N), LoHaConfig(), "are not known to train under virtual tokens"),
        (prompt(N), LoraConfig(bias="all"), "belong to the base, which is frozen"),
    ],
    ids=["virtual twice", "weights twice", "full", "three levels", "another kind", "biases"],
)
def test_what_cannot_be_trained_together_is_refused_with_the_reason(a: Any, b: Any, reason: str) -> None:
    with pytest.raises(CapabilityError, match=rf"stack: expected .+, got .+{reason}"):
        stack(a, b)


@pytest.mark.parametrize("over", [lambda: lora(4), lambda: prompt(N)])
def test_one_on_a_model_with_adapters_is_refused_and_leaves_them_trained(over: Any) -> None:
    model = attach(tiny_model(), over())
    before = list(trained(model))
    with pytest.raises(CapabilityError, match="expected a plain model for virtual tokens with weights"):
        attach(model, stack(prompt(N), lora(4)), name="stack")
    assert list(trained(model)) == before


def test_one_more_on_a_model_with_a_stack_is_refused() -> None:
    """The weights beneath would act under the other virtual tokens too."""
    with pytest.raises(CapabilityError, match=r"got the adapters \['default'\]"):
        attach(stacked(), prompt(N), name="other")


def test_one_kind_over_the_other_is_refused_by_naming_the_stack() -> None:
    with pytest.raises(CapabilityError, match=r"ftlib\.adapters\.stack\(prompt\(\), lora\(\)\)"):
        attach(attach(tiny_model(), lora(4)), prompt(N), name="soft")


def test_a_stack_that_cannot_be_attached_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    model.activation_checkpointing_enable()
    names = list(model.state_dict())
    with pytest.raises(CapabilityError, match="activation checkpointing"):
        attach(model, stack(prefix(N), lora(4)))
    assert list(model.state_dict()) == names


def test_the_declarations_it_is_made_of_stay_as_they_are() -> None:
    virtual, weights = prompt(N, new_tokens=[5]), lora(4, new_tokens=[6], modules_to_save=["norm"])
    before = [each.config.to_dict() for each in (virtual, weights)]  # type: ignore[union-attr]
    attach(tiny_model(), stack(virtual, weights))
    assert [each.config.to_dict() for each in (virtual, weights)] == before  # type: ignore[union-attr]
    assert virtual.config.trainable_token_indices == [5]  # type: ignore[union-attr]


# -- saved, loaded, resumed ----------------------------------------------------------------------------


@every
@pytest.mark.parametrize("name", ["default", "other"])
def test_saved_plain_peft_reads_one_after_the_other(kind: str, name: str, tmp_path: Path) -> None:
    model = moved(stacked(kind, name=name))
    save_weights(tmp_path, model)
    base = PeftModel.from_pretrained(tiny_model(), str(tmp_path), subfolder="weights").get_base_model()
    assert torch.equal(logits(PeftModel.from_pretrained(base, str(tmp_path))), logits(model))


@every
@pytest.mark.parametrize("flat", [False, True])
def test_loaded_it_is_trained_on_as_it_was_saved(kind: str, flat: bool, tmp_path: Path) -> None:
    model = moved(stacked(kind))
    save_weights(tmp_path, model, flat=flat)
    loaded = load_adapter(tiny_model(), tmp_path)
    assert torch.equal(logprobs(loaded), logprobs(model))
    assert beneath(loaded, "default") is not None
    assert any("lora_" in name or "ia3_" in name for name in trained(loaded))
    assert any("prompt_encoder" in name for name in trained(loaded))
    assert not trained(load_adapter(tiny_model(), tmp_path, trainable=False))


@every
def test_under_a_score_head_both_and_the_head_are_saved(kind: str, tmp_path: Path) -> None:
    model = moved(stacked(kind, shell=as_reward_model))
    assert any("score.modules_to_save" in name for name in trained(model))
    save_weights(tmp_path, model)
    plain = as_reward_model(tiny_model())
    expected = forward(model.eval(), BATCH, scores=True).scores_CK
    assert_close(forward(load_adapter(plain, tmp_path), BATCH, scores=True).scores_CK, expected)


def test_it_is_exported_on_the_original_base_from_factors_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = moved(attach(tiny_model(), stack(prompt(N), lora(4, init="pissa"))))
    save_weights(tmp_path, model)
    assert json.loads((tmp_path / "weights" / "adapter_config.json").read_text())["r"] == 8
    assert_close(logprobs(load_adapter(tiny_model(), tmp_path)), logprobs(model), rtol=1e-5, atol=1e-5)


def test_new_tokens_are_saved_beside_both(tmp_path: Path) -> None:
    model = moved(attach(tiny_model(), stack(lora(4, new_tokens=[5]), prompt(N))))
    save_weights(tmp_path, model)
    assert not any(
        "token_adapter" in key for key in load_file(tmp_path / "weights" / "adapter_model.safetensors")
    )
    base = tiny_model()
    for part, step in (("new_tokens", "merge_and_unload"), ("weights", "get_base_model")):
        base = getattr(PeftModel.from_pretrained(base, str(tmp_path), subfolder=part), step)()
    assert_close(logits(PeftModel.from_pretrained(base, str(tmp_path))), logits(model), rtol=0, atol=1e-6)
    assert torch.equal(logprobs(load_adapter(tiny_model(), tmp_path)), logprobs(model))


def test_the_card_says_how_to_read_both(tmp_path: Path) -> None:
    target = save(tmp_path / "out", stacked(), None, card=CardData("a stack"))
    card = (target / "README.md").read_text()
    assert 'subfolder="weights").get_base_model()' in card
    assert "(num_virtual_tokens=4) with LORA (r=4, lora_alpha=8)" in card.replace("\\", "")
    save(target, attach(tiny_model(), prompt(N)), None, card=CardData("a prompt alone"))
    assert not (target / "weights").exists()


def test_weights_of_another_base_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path, stacked())
    with pytest.raises(CheckpointError, match="expected weights of the layers of this base"):
        load_adapter(tiny_model(intermediate_size=80), tmp_path)


def test_weights_beneath_are_looked_at_before_anything_is_built(tmp_path: Path) -> None:
    save_weights(tmp_path, stacked())
    path = tmp_path / "weights" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"peft_type": "PREFIX_TUNING"}))
    with pytest.raises(ConfigError, match="peft_type: expected one of LORA, IA3"):
        load_adapter(tiny_model(), tmp_path)
    path.write_text(json.dumps(config))
    weights = load_file(path.with_name("adapter_model.safetensors"))
    save_file(
        {key: value * torch.nan for key, value in weights.items()},
        path.with_name("adapter_model.safetensors"),
    )
    with pytest.raises(CheckpointError, match="expected finite values"):
        load_adapter(tiny_model(), tmp_path)


@every
def test_a_resumed_run_is_the_run_that_was_not_stopped(kind: str, tmp_path: Path) -> None:
    def go(folder: Path | None, **options: Any) -> Any:
        return run(folder, adapter=STACKS[kind](), learning_rate=None, **options)

    whole = go(None)
    go(tmp_path, callbacks=[stop_after(2)])
    assert_same(go(tmp_path, resume=True), whole)


def test_a_run_knows_itself_by_the_weights_beneath_too() -> None:
    settings = [
        adapter_settings(attach(tiny_model(), stack(prompt(N), lora(4, alpha=alpha)))) for alpha in (4, 8)
    ]
    assert settings[0] != settings[1]
