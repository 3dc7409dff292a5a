"""A second model on one base: the same tensors, the base's own numbers, and the bases it refuses."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from ftlib.adapters import attach, full, lora
from ftlib.errors import CapabilityError
from ftlib.models import as_reward_model, forward
from ftlib.models.sharing import on_same_base, shared_with
from tests.models.policies import BATCH, policy, train
from tests.models_zoo import ARCHITECTURES, tiny_model

STAYS = (
    "lora trained",
    "lora dropout",
    "lora and head",
    "lora on embeddings",
    "lora and tokens",
    "dora trained",
    "ia3",
)
CHANGES = {
    "full": "it has no adapter",
    "pissa": "does not declare off_is_base",
    "lora and norms": "weights outside its adapters are trained too",
    "lora beside pissa": "adapter 'other' does not declare off_is_base",
}


def storages(model: nn.Module) -> set[int]:
    return {weight.data_ptr() for weight in model.parameters()}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights and buffers."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def logprobs(model: nn.Module) -> Tensor:
    return forward(model, BATCH).logprobs_N


def adapted(arch: str, **changes: Any) -> tuple[PreTrainedModel, nn.Module]:
    """The plain model, and another one with the same weights under a trained adapter."""
    torch.manual_seed(0)
    model = attach(tiny_model(arch, **changes).requires_grad_(False), lora(4))
    train(model)
    return tiny_model(arch, **changes), model


# --- the same base ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_is_the_base_in_the_same_memory(arch: str, tied: bool) -> None:
    plain, model = adapted(arch, tie_word_embeddings=tied)
    twin = on_same_base(model)
    assert type(twin) is type(plain)
    assert torch.equal(logprobs(twin), logprobs(plain))
    assert storages(twin) < storages(model)
    assert twin.state_dict().keys() == plain.state_dict().keys()
    same = twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    assert same is tied


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_of_it_lacks_memory(arch: str) -> None:
    twin = on_same_base(adapted(arch)[1])
    held = [value for module in twin.modules() for value in vars(module).values()]
    held += [*twin.parameters(), *twin.buffers()]
    assert not [tensor for tensor in held if isinstance(tensor, Tensor) and tensor.is_meta]


@pytest.mark.parametrize("state", STAYS)
def test_any_adapter_that_leaves_its_base_alone_will_do(state: str) -> None:
    model = policy(state)
    train(model)
    assert torch.equal(logprobs(on_same_base(model)), logprobs(tiny_model()))


def test_tokens_trained_in_tied_embeddings_are_found_in_their_base() -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], trainable_token_indices=[5, 60]
    )
    model = attach(tiny_model(tie_word_embeddings=True).requires_grad_(False), config)
    train(model)
    plain = tiny_model(tie_word_embeddings=True)
    assert torch.equal(logprobs(on_same_base(model)), logprobs(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_has_the_dtype_of_the_base(dtype: torch.dtype) -> None:
    model = attach(tiny_model().to(dtype).requires_grad_(False), lora(4))
    assert {tensor.dtype for tensor in on_same_base(model).parameters()} == {dtype}


def test_the_model_and_the_random_state_are_as_before() -> None:
    _, model = adapted("llama")
    before, random = tensors(model), torch.get_rng_state()
    config = deepcopy(model.get_base_model().config.to_dict())
    on_same_base(model)
    after = tensors(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.get_base_model().config.to_dict() == config


# --- a second adapter -------------------------------------------------------------------------------


def test_a_second_adapter_leaves_the_first_model_and_the_base_alone() -> None:
    plain, model = adapted("llama")
    base, said = tensors(plain), logprobs(model)
    second = attach(on_same_base(model), lora(4))
    assert list(second.peft_config) == ["default"]
    train(second)
    assert torch.equal(logprobs(model), said)
    assert not torch.equal(logprobs(second), logprobs(plain))
    twin = tensors(on_same_base(model))
    assert all(torch.equal(twin[name], tensor) for name, tensor in base.items())


def test_the_backward_of_either_gives_the_other_no_gradient() -> None:
    _, model = adapted("llama")
    second = attach(on_same_base(model), lora(4))
    forward(second, BATCH).logprobs_N.sum().backward()
    assert all(weight.grad is None for weight in model.parameters())
    assert any(weight.grad is not None for weight in second.parameters())
    assert not shared_with(second, model)


def test_a_reward_model_can_be_made_of_it() -> None:
    plain, model = adapted("llama")
    torch.manual_seed(1)
    expected_CK = forward(as_reward_model(plain), BATCH, scores=True).scores_CK
    torch.manual_seed(1)
    assert torch.equal(
        forward(as_reward_model(on_same_base(model)), BATCH, scores=True).scores_CK,  # type: ignore[arg-type]
        expected_CK,
    )


def test_moving_the_model_moves_it_too() -> None:
    """A trainer puts its model on a device after others were made around its base."""
    _, model = adapted("llama")
    twin = on_same_base(model)
    model.to(torch.float64)
    assert {tensor.dtype for tensor in twin.parameters()} == {torch.float64}
    assert storages(twin) < storages(model)


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(("state", "reason"), CHANGES.items(), ids=list(CHANGES))
def test_a_base_that_moves_is_refused_with_the_reason(state: str, reason: str) -> None:
    with pytest.raises(CapabilityError, match=f"{reason}.*Give the role a model of its own"):
        on_same_base(policy(state))


def test_a_merged_adapter_is_refused() -> None:
    _, model = adapted("llama")
    model.merge_adapter()
    with pytest.raises(CapabilityError, match=r"merged with \['default'\]"):
        on_same_base(model)


class Doubled(nn.Linear):
    """A layer that its configuration knows nothing of, as a quantised one is."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_layer_of_another_kind_is_refused_by_its_name() -> None:
    model = tiny_model().requires_grad_(False)
    layer = model.model.layers[1].mlp
    layer.up_proj = Doubled(layer.up_proj.in_features, layer.up_proj.out_features, bias=False)
    with pytest.raises(CapabilityError, match=r"'model.layers.1.mlp.up_proj' as Linear.*got Doubled"):
        on_same_base(attach(model, lora(4, targets=["q_proj"])))


def test_what_two_models_would_both_train_is_named() -> None:
    _, model = adapted("llama")
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert shared_with(model, model) == trained
    assert shared_with(tiny_model(), model) == []
    twin = on_same_base(model)
    assert shared_with(twin, model) == []
    twin.lm_head.requires_grad_(True)
    assert shared_with(twin, model) == ["lm_head.weight"]


@pytest.mark.parametrize(
    ("adapter", "found"),
    [
        (full(), "full fine-tuning"),
        (lora(4, init="pissa"), "taken out"),
        (lora(4, init="olora"), "taken out"),
    ],
    ids=["full", "pissa", "olora"],
)
def test_what_would_write_into_the_shared_base_is_refused(adapter: Any, found: str) -> None:
    plain, model = adapted("llama")
    said = logprobs(model)
    for twin in (on_same_base(model), as_reward_model(on_same_base(model))):
        with pytest.raises(CapabilityError, match=f"off_is_base on a base that another model .*{found}"):
            attach(twin, adapter)
    assert torch.equal(logprobs(model), said)
    assert attach(plain, adapter) is not None  # a base of its own
