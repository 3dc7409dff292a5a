"""Checkpointed layers, recomputed in the backward, attend as they did in the forward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing import assert_close
from transformers import PreTrainedModel

from ftlib.adapters import attach, lora
from ftlib.errors import CapabilityError
from ftlib.models import attention as attention_module
from ftlib.models.attention import NAME
from ftlib.models.checkpointing import disable_checkpointing, enable_checkpointing
from ftlib.models.forward import forward
from tests.models_zoo import ARCHITECTURES, tiny_model
from tests.packed import random_batch

BATCH = random_batch()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    (forward(model, BATCH).logprobs_N * BATCH.weights_N).sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def by_transformers(model: PreTrainedModel, **options: object) -> None:
    model.activation_checkpointing_enable(options)


def by_torch(model: PreTrainedModel) -> None:
    """The wrapper that FSDP's own activation checkpointing puts around layers."""
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)


WAYS: dict[str, Callable[[PreTrainedModel], None]] = {
    "ftlib": enable_checkpointing,
    "ftlib, every second layer": functools.partial(enable_checkpointing, every_n_layers=2),
    "transformers": functools.partial(by_transformers, use_reentrant=False),
    "transformers, reentrant": functools.partial(by_transformers, use_reentrant=True),
    "torch": by_torch,
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_are_those_without_checkpointing(arch: str) -> None:
    plain, checkpointed = tiny_model(arch).train(), tiny_model(arch).train()
    enable_checkpointing(checkpointed)
    assert_close(gradients(checkpointed), gradients(plain), rtol=0, atol=0)


@pytest.mark.parametrize("way", list(WAYS))
def test_however_it_was_enabled(way: str) -> None:
    plain, checkpointed = tiny_model("mistral").train(), tiny_model("mistral").train()
    WAYS[way](checkpointed)
    found = {
        name.replace("_checkpoint_wrapped_module.", ""): x for name, x in gradients(checkpointed).items()
    }
    assert_close(found, gradients(plain), rtol=0, atol=0)
    assert checkpointed.config._attn_implementation == "eager"


@pytest.mark.parametrize("way", ["ftlib", "transformers, reentrant"])
def test_adapters_on_a_frozen_base_get_their_gradients(way: str) -> None:
    def adapted(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = attach(tiny_model().requires_grad_(False), lora(r=2, dropout=0.0)).train()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
        return model

    plain, checkpointed = adapted(), adapted()
    WAYS[way](checkpointed.get_base_model())
    found = gradients(checkpointed)
    assert_close(found, gradients(plain))
    assert all(bool(gradient.abs().max() > 0) for gradient in found.values())


def test_each_layer_is_computed_twice_under_the_grouped_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recomputation is real: two layers attend twice, by grouped attention every time."""
    model, calls = tiny_model().train(), []
    enable_checkpointing(model)
    forward(model, BATCH)  # the start-up check attends too
    attend = attention_module.attend

    def counted(*args: object) -> Tensor:
        calls.append(model.config._attn_implementation)
        return attend(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(attention_module, "attend", counted)
    gradients(model)
    assert calls == [NAME] * 4


def test_two_backwards_through_one_graph_agree() -> None:
    model = tiny_model().train()
    enable_checkpointing(model)
    loss = forward(model, BATCH).logprobs_N.sum()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert_close(torch.autograd.grad(loss, list(model.parameters())), first, rtol=0, atol=0)


def test_the_users_own_checkpoint_function_stays_in_place() -> None:
    model = tiny_model().train()
    by_transformers(model, use_reentrant=True)
    layer = model.model.layers[0]
    before = layer._gradient_checkpointing_func
    gradients(model)
    assert layer._gradient_checkpointing_func is before


def test_a_padded_forward_under_checkpointing_keeps_the_models_attention() -> None:
    plain, checkpointed = tiny_model().train(), tiny_model().train()
    enable_checkpointing(checkpointed)
    ids_BL = torch.arange(3, 15).view(2, 6)
    for model in (plain, checkpointed):
        model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss.backward()
    for ours, expected in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, expected.grad, rtol=0, atol=0)


def test_disabling_undoes_it_even_after_enabling_twice() -> None:
    model = attach(tiny_model(), lora(r=2)).train()
    embedding = model.get_base_model().get_input_embeddings()
    enable_checkpointing(model)
    enable_checkpointing(model)
    assert model.get_base_model().is_activation_checkpointing
    assert embedding(torch.tensor([5])).requires_grad
    disable_checkpointing(model)
    assert not model.get_base_model().is_activation_checkpointing
    assert not embedding(torch.tensor([5])).requires_grad


def test_a_model_that_declares_it_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(CapabilityError, match="declares that it does not"):
        enable_checkpointing(model)
    assert not model.is_activation_checkpointing
