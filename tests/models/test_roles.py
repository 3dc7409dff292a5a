"""A role changes what a model computes for a scope, and nothing after it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.helpers import DoraCaching
from torch import Tensor, nn
from torch.testing import assert_close

from ftlib.adapters import attach, lora
from ftlib.errors import CapabilityError, ShapeError
from ftlib.models.adapted import active_adapters, tuner_layers
from ftlib.models.forward import forward
from ftlib.models.roles import adapters_active, adapters_off, restored, swapped_weights
from tests.models.policies import BATCH, BESIDE, NAME, POLICIES, policy, train
from tests.models_zoo import tiny_model

KEEPS_BASE = [state for state in POLICIES if not {"pissa", "full", "norms"} & set(state.split())]


def two_adapters(head: str = "lm_head") -> PeftModel:
    """`NAME` active, `BESIDE` not and with a head of its own; both trained, both to be trained on."""
    torch.manual_seed(0)
    heads = [head] if head else None
    model = attach(tiny_model().requires_grad_(False), lora(2, modules_to_save=heads), name=BESIDE)
    train(model)
    attach(model, lora(4), name=NAME)
    train(model, seed=2)
    for name, weight in model.named_parameters():
        weight.requires_grad_(f".{NAME}." in name or f".{BESIDE}." in name)
    return model.train()


def copies(model: nn.Module) -> dict[str, Tensor]:
    """Other values for all trainable weights."""
    return {name: 1 + weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def state(model: nn.Module) -> dict[str, Any]:
    """All that a role may change; weights by identity and by value."""
    return {
        "modes": [module.training for module in model.modules()],
        "trained": [weight.requires_grad for weight in model.parameters()],
        "weights": [(id(weight), weight.data_ptr(), weight.sum().item()) for weight in model.parameters()],
        "layers": [(layer.active_adapter, layer.disable_adapters) for layer in tuner_layers(model)],
        "peft": (model.active_adapter, model.active_adapters, model.get_model_status().enabled)
        if isinstance(model, PeftModel)
        else None,
        "hooks": [len(module._forward_hooks) for module in model.modules()],
    }


SCOPES: dict[str, Callable[[nn.Module], AbstractContextManager[None]]] = {
    "off": adapters_off,
    "none active": lambda model: adapters_active(model, ()),
    "other weights": lambda model: swapped_weights(model, copies(model)),
    "restored": restored,
}
WITH_TWO = SCOPES | {"another active": lambda model: adapters_active(model, (BESIDE,))}


def meddle(model: nn.Module) -> None:
    """What code inside a scope may do to the model."""
    model.eval()
    model.requires_grad_(requires_grad=False)
    if isinstance(model, PeftModel):
        model.set_adapter(BESIDE if BESIDE in model.peft_config else NAME)
        model.base_model.enable_adapter_layers()


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("scope", WITH_TWO)
def test_everything_is_as_before_after_a_scope(scope: str, failing: bool) -> None:
    model = two_adapters()
    model.get_submodule("base_model.model.model.layers.1").eval()  # one layer apart from the others
    before = state(model)
    with suppress(ZeroDivisionError), WITH_TWO[scope](model):
        forward(model, BATCH)
        meddle(model)
        if failing:
            raise ZeroDivisionError
    assert state(model) == before


@pytest.mark.parametrize("scope", SCOPES)
def test_a_plain_model_too(scope: str) -> None:
    model = tiny_model().train()
    before = state(model)
    with suppress(ZeroDivisionError), SCOPES[scope](model):
        meddle(model)
        raise ZeroDivisionError
    assert state(model) == before


def test_scopes_nest() -> None:
    model = two_adapters()
    before = state(model)
    with adapters_active(model, (BESIDE,)):
        outer = state(model)
        with adapters_off(model), swapped_weights(model, copies(model)):
            forward(model, BATCH)
        assert state(model) == outer
    assert state(model) == before


def test_adapters_that_were_off_stay_off() -> None:
    model = policy("lora trained")
    with model.disable_adapter():
        before = state(model)
        with adapters_active(model, (NAME,)):
            on = forward(model, BATCH).logprobs_N
        assert state(model) == before
    assert torch.equal(on, forward(model, BATCH).logprobs_N)


@pytest.mark.parametrize("name", KEEPS_BASE)
def test_off_is_the_base_bit_for_bit(name: str) -> None:
    model = policy(name).eval()
    train(model)
    base, ids_1T = tiny_model(), BATCH.ids_T[None]
    assert not torch.allclose(model(ids_1T).logits, base(ids_1T).logits)
    for scope in (adapters_off(model), adapters_active(model, ())):
        with scope:
            assert torch.equal(model(ids_1T).logits, base(ids_1T).logits)
            assert torch.equal(forward(model, BATCH).logprobs_N, forward(base, BATCH).logprobs_N)


def test_off_is_the_base_in_bfloat16_too() -> None:
    model = policy("lora trained").eval()
    base = tiny_model()
    for each in (model.get_base_model(), base):
        for name, weight in each.named_parameters():
            weight.data = weight.data if "lora" in name else weight.data.bfloat16()
    with adapters_off(model):
        assert torch.equal(forward(model, BATCH).logprobs_N, forward(base, BATCH).logprobs_N)


def test_several_active_adapters_are_all_off_and_all_back() -> None:
    model = attach(attach(tiny_model().requires_grad_(False), lora(2), name=BESIDE), lora(4), name=NAME)
    train(model.requires_grad_(requires_grad=True))
    model.base_model.set_adapter([BESIDE, NAME])
    both = forward(model, BATCH).logprobs_N
    with adapters_off(model):
        off = forward(model, BATCH).logprobs_N
        assert active_adapters(model) == ()
    with adapters_active(model, [NAME]):
        assert active_adapters(model) == (NAME,)
        one = forward(model, BATCH).logprobs_N
    with adapters_active(model, []), adapters_active(model, [BESIDE, NAME]):
        assert torch.equal(forward(model, BATCH).logprobs_N, both)
    assert active_adapters(model) == (BESIDE, NAME)
    assert torch.equal(forward(model, BATCH).logprobs_N, both)
    assert not torch.allclose(off, both)
    assert not torch.allclose(one, both)


def test_another_adapter_computes_what_it_computes_alone() -> None:
    """Its own module in the place of the head included, which the active one has not."""
    model = two_adapters().eval()
    model.set_adapter(BESIDE)
    alone = forward(model, BATCH).logprobs_N
    model.set_adapter(NAME)
    assert not torch.allclose(forward(model, BATCH).logprobs_N, alone)
    with adapters_active(model, (BESIDE,)):
        assert model.active_adapter == BESIDE
        assert active_adapters(model) == (BESIDE,)
        assert torch.equal(forward(model, BATCH).logprobs_N, alone)


def test_an_adapter_without_tokens_of_its_own_reads_the_bases() -> None:
    model = policy("lora and tokens").eval()
    train(model)
    attach(model, lora(2), name=BESIDE)
    alone = forward(model, BATCH).logprobs_N
    model.set_adapter(NAME)
    assert not torch.allclose(forward(model, BATCH).logprobs_N, alone)
    with adapters_active(model, (BESIDE,)):
        assert torch.equal(forward(model, BATCH).logprobs_N, alone)


def test_inside_a_scope_peft_says_what_is_on() -> None:
    model = two_adapters()
    with adapters_off(model):
        assert model.get_model_status().enabled is False
        assert not model.has_active_enabled_adapter
        with adapters_active(model, (BESIDE,)):
            assert model.get_model_status().enabled is True
            assert model.active_adapters == [BESIDE]
            assert model.has_active_enabled_adapter


def test_an_adapter_trained_in_a_scope_gets_its_gradient_after_it() -> None:
    """The switch of peft would freeze it again between the forward and the backward."""
    model = two_adapters(head="")
    with adapters_active(model, (BESIDE,)):
        loss = forward(model, BATCH).logprobs_N.sum()
    loss.backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == (f".{BESIDE}." in name)


@pytest.mark.parametrize("name", ["lora trained", "lora and head", "lora on embeddings", "dora", "full"])
def test_swapped_weights_compute_as_if_they_were_the_models(name: str) -> None:
    model, other = policy(name).eval(), policy(name).eval()
    train(other)
    weights = dict(other.named_parameters())
    with swapped_weights(model, {key: weights[key].detach() for key in copies(model)}):
        inside = dict(model.named_parameters())
        assert all(inside[key].data_ptr() == weights[key].data_ptr() for key in copies(other))  # no copies
        found = forward(model, BATCH).logprobs_N
        assert not found.requires_grad
    assert torch.equal(found, forward(other, BATCH).logprobs_N)
    assert not torch.allclose(found, forward(model, BATCH).logprobs_N)


def test_a_tied_weight_is_swapped_in_every_place() -> None:
    model, other = tiny_model("gpt2"), tiny_model("gpt2", seed=1)
    assert model.lm_head.weight is model.transformer.wte.weight
    given = {name: weight.detach() for name, weight in other.named_parameters()}
    assert "lm_head.weight" not in given
    with swapped_weights(model, given):
        assert torch.equal(forward(model, BATCH).logprobs_N, forward(other, BATCH).logprobs_N)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize(
    ("weights", "found"),
    [
        ({"nowhere": torch.zeros(2)}, "none of that name"),
        ({"lm_head.weight": torch.zeros(2)}, "in the model"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: dict[str, Tensor], found: str) -> None:
    model = tiny_model()
    before = state(model)
    with pytest.raises(ShapeError, match=found), swapped_weights(model, weights):
        pass
    assert state(model) == before


def test_weights_of_a_special_kind_are_refused() -> None:
    """As FSDP's are, which its hooks put back in place during the forward."""

    class Sharded(Tensor):
        pass

    model = tiny_model()
    model.lm_head.weight = nn.Parameter(torch.Tensor._make_subclass(Sharded, model.lm_head.weight.detach()))
    with (
        pytest.raises(CapabilityError, match=r"Sharded for 'lm_head\.weight'"),
        swapped_weights(model, {"lm_head.weight": torch.zeros_like(model.lm_head.weight)}),
    ):
        pass


def test_autocast_does_not_remember_the_weights_of_another_role() -> None:
    """It keeps the bfloat16 form of a trained weight until its scope ends."""
    model = policy("lora trained").eval()
    weights = copies(model)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), swapped_weights(model, weights):
        alone = forward(model, BATCH, path="padded").logprobs_N
    with torch.autocast("cpu", torch.bfloat16):
        before = forward(model, BATCH, path="padded").logprobs_N
        with swapped_weights(model, weights), torch.no_grad():
            assert torch.equal(forward(model, BATCH, path="padded").logprobs_N, alone)
        after = forward(model, BATCH, path="padded").logprobs_N
    assert torch.equal(after, before)
    after.sum().backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)


def test_peft_does_not_remember_the_norms_of_another_role() -> None:
    model = policy("dora trained").eval()
    weights = copies(model)
    with swapped_weights(model, weights):
        alone = forward(model, BATCH).logprobs_N
    before = forward(model, BATCH).logprobs_N
    with DoraCaching():
        assert torch.equal(forward(model, BATCH).logprobs_N, before)
        with swapped_weights(model, weights):
            assert torch.equal(forward(model, BATCH).logprobs_N, alone)
        assert torch.equal(forward(model, BATCH).logprobs_N, before)


@pytest.mark.parametrize("scope", ["off", "none active", "other weights"])
def test_a_merged_adapter_is_refused(scope: str) -> None:
    model = policy("lora trained")
    model.merge_adapter()
    with pytest.raises(CapabilityError, match="unmerge_adapter"), SCOPES[scope](model):
        pass


def test_an_unknown_adapter_is_refused() -> None:
    with (
        pytest.raises(CapabilityError, match=rf"\['{NAME}'\], got \['nobody'\]"),
        adapters_active(policy("lora"), ["nobody"]),
    ):
        pass


def test_layers_that_disagree_have_no_active_adapters_to_name() -> None:
    model = two_adapters()
    next(iter(tuner_layers(model))).set_adapter([BESIDE])
    with pytest.raises(CapabilityError, match="same active adapters"):
        active_adapters(model)


def test_gradients_are_those_without_the_roles_between() -> None:
    model, plain = two_adapters(), two_adapters()
    forward(plain, BATCH).logprobs_N.sum().backward()
    with adapters_off(model), torch.no_grad():
        forward(model, BATCH)
    loss = forward(model, BATCH).logprobs_N.sum()
    with swapped_weights(model, copies(model)), adapters_active(model, (BESIDE,)), torch.no_grad():
        forward(model, BATCH)
    loss.backward()
    theirs = dict(plain.named_parameters())
    for name, weight in model.named_parameters():
        assert_close(weight.grad, theirs[name].grad, rtol=0, atol=0)
