"""An optimiser put back from named tensors continues bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from ftlib.engine.files import load_tensors, save_tensors
from ftlib.engine.optimizer_state import flatten_optimizer, restore_optimizer
from ftlib.errors import CheckpointError

STEPS = 3


def build_model(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def two_groups(model: nn.Module) -> list[dict]:
    weights = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 0.02}]


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, first + STEPS):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(5, 3, generator=generator).to(dtype)
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


OPTIMIZERS = {
    "adamw": lambda m: torch.optim.AdamW(two_groups(m), lr=0.01),
    "adamw foreach": lambda m: torch.optim.AdamW(two_groups(m), lr=0.01, foreach=True),
    "adamw fused": lambda m: torch.optim.AdamW(two_groups(m), lr=0.01, fused=True),
    "adamw amsgrad": lambda m: torch.optim.AdamW(two_groups(m), lr=0.01, amsgrad=True),
    "adamw tensor lr": lambda m: torch.optim.AdamW(m.parameters(), lr=torch.tensor(0.01), foreach=False),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "sgd momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01),
    "rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=0.01),
    "asgd": lambda m: torch.optim.ASGD(m.parameters(), lr=0.01),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_restored_optimizer_continues_bit_for_bit(tmp_path, make, dtype):
    """A: six steps. B: three steps, through disk into a fresh model and optimiser, three more."""
    model_a = build_model(dtype)
    optimizer_a = make(model_a)
    take_steps(model_a, optimizer_a, 0)
    tensors, scalars = flatten_optimizer(optimizer_a, named(model_a))
    save_tensors(tmp_path / "optimizer.safetensors", tensors)
    text = json.dumps(scalars)
    weights = {name: value.detach().clone() for name, value in model_a.state_dict().items()}
    take_steps(model_a, optimizer_a, STEPS)

    model_b = build_model(dtype)
    model_b.load_state_dict(weights)
    optimizer_b = make(model_b)
    restore_optimizer(
        optimizer_b, named(model_b), load_tensors(tmp_path / "optimizer.safetensors"), json.loads(text)
    )
    take_steps(model_b, optimizer_b, STEPS)
    for a, b in zip(model_a.parameters(), model_b.parameters(), strict=True):
        assert torch.equal(a, b)
    state_a, state_b = (
        flatten_optimizer(o, named(m)) for o, m in [(optimizer_a, model_a), (optimizer_b, model_b)]
    )
    assert state_a[1] == state_b[1]
    assert state_a[0].keys() == state_b[0].keys()
    assert all(torch.equal(state_a[0][key], state_b[0][key]) for key in state_a[0])


def test_without_the_moments_the_weights_would_differ():
    model = build_model()
    optimizer = OPTIMIZERS["adamw"](model)
    take_steps(model, optimizer, 0)
    fresh = build_model()
    fresh.load_state_dict(model.state_dict())
    take_steps(model, optimizer, STEPS)
    take_steps(fresh, OPTIMIZERS["adamw"](fresh), STEPS)
    assert not torch.equal(model[0].weight, fresh[0].weight)


def test_tensors_are_keyed_by_parameter_name():
    model = build_model()
    optimizer = OPTIMIZERS["adamw"](model)
    take_steps(model, optimizer, 0)
    tensors, scalars = flatten_optimizer(optimizer, named(model))
    assert {key for key in tensors if key.startswith("exp_avg/")} == {
        "exp_avg/0.weight",
        "exp_avg/0.bias",
        "exp_avg/1.weight",
        "exp_avg/1.bias",
    }
    assert scalars["groups"][0]["parameters"] == {"0.weight": [4, 3], "1.weight": [2, 4]}


def test_float32_moments_of_bfloat16_weights_stay_float32():
    """torch's load_state_dict would round them to the weight's dtype."""
    model = build_model(torch.bfloat16)
    optimizer = OPTIMIZERS["sgd momentum"](model)
    moment = torch.tensor(1 / 3)  # no bfloat16 number
    for parameter in model.parameters():
        optimizer.state[parameter] = {"momentum_buffer": moment.expand(parameter.shape).clone()}
    tensors, scalars = flatten_optimizer(optimizer, named(model))
    other = build_model(torch.bfloat16)
    restored = OPTIMIZERS["sgd momentum"](other)
    restore_optimizer(restored, named(other), tensors, scalars)
    buffer = restored.state[other[0].weight]["momentum_buffer"]
    assert buffer.dtype == torch.float32
    assert torch.equal(buffer, moment.expand(4, 3))


def test_restored_tensors_are_copies():
    model = build_model()
    optimizer = OPTIMIZERS["adamw"](model)
    take_steps(model, optimizer, 0)
    tensors, scalars = flatten_optimizer(optimizer, named(model))
    kept = {key: value.clone() for key, value in tensors.items()}
    other = build_model()
    restored = OPTIMIZERS["adamw"](other)
    restore_optimizer(restored, named(other), tensors, scalars)
    take_steps(other, restored, STEPS)
    assert all(torch.equal(tensors[key], kept[key]) for key in kept)


def test_learning_rate_comes_back_and_machine_flags_stay():
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, foreach=True)
    tensors, scalars = flatten_optimizer(optimizer, named(model))
    restored = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    restore_optimizer(restored, named(model), tensors, json.loads(json.dumps(scalars)))
    assert restored.param_groups[0]["lr"] == 0.5
    assert restored.param_groups[0]["foreach"] is False
    assert restored.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize(("fused", "step_device"), [(False, "cpu"), (True, "meta")])
def test_moments_lie_beside_their_parameter_and_the_step_count_where_torch_wants_it(fused, step_device):
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters())
    take_steps(model, optimizer, 0)
    tensors, scalars = flatten_optimizer(optimizer, named(model))
    elsewhere = build_model().to("meta")
    restored = torch.optim.AdamW(elsewhere.parameters())
    restored.param_groups[0]["fused"] = fused
    restore_optimizer(restored, named(elsewhere), tensors, scalars)
    state = restored.state[elsewhere[0].weight]
    assert state["exp_avg"].device.type == "meta"
    assert state["step"].device.type == step_device


def test_stale_state_of_the_new_optimizer_is_cleared():
    model = build_model()
    tensors, scalars = flatten_optimizer(OPTIMIZERS["adamw"](model), named(model))  # before any step
    used = OPTIMIZERS["adamw"](model)
    take_steps(model, used, 0)
    restore_optimizer(used, named(model), tensors, scalars)
    assert len(used.state) == 0


def test_other_shape_is_refused_by_name_and_nothing_changes():
    model = build_model()
    optimizer = OPTIMIZERS["adamw"](model)
    take_steps(model, optimizer, 0)
    tensors, scalars = flatten_optimizer(optimizer, named(model))
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    restored = OPTIMIZERS["adamw"](other)
    with pytest.raises(CheckpointError, match=r"expected 0\.weight with shape \[4, 3\], got \[5, 3\]"):
        restore_optimizer(restored, named(other), tensors, scalars)
    assert len(restored.state) == 0


def test_other_number_of_groups_is_refused():
    model = build_model()
    tensors, scalars = flatten_optimizer(OPTIMIZERS["adamw"](model), named(model))
    with pytest.raises(CheckpointError, match="expected 2 parameter groups, got 1"):
        restore_optimizer(OPTIMIZERS["sgd"](model), named(model), tensors, scalars)


def test_state_of_an_unknown_parameter_is_refused():
    model = build_model()
    optimizer = OPTIMIZERS["adamw"](model)
    _, scalars = flatten_optimizer(optimizer, named(model))
    with pytest.raises(CheckpointError, match=r"state of 'lm_head\.weight'"):
        restore_optimizer(optimizer, named(model), {"exp_avg/lm_head.weight": torch.zeros(1)}, scalars)


def test_parameter_without_a_name_is_refused():
    model = build_model()
    with pytest.raises(CheckpointError, match=r"none for one of shape \(4, 3\) in group 0"):
        flatten_optimizer(OPTIMIZERS["sgd"](model), {})


def test_state_that_is_neither_tensor_nor_plain_is_refused_by_name():
    model = build_model()
    optimizer = OPTIMIZERS["sgd"](model)
    optimizer.state[model[0].bias]["history"] = {"a": 1}
    with pytest.raises(
        CheckpointError, match=r"0\.bias, history: expected a tensor or a plain value, got dict"
    ):
        flatten_optimizer(optimizer, named(model))


def test_numbers_and_names_in_the_state_round_trip():
    model = build_model()
    optimizer = OPTIMIZERS["sgd"](model)
    entries = {"step": 3, "mode": "warm", "span": (1, 2), "seen": None, "list": [1.5]}
    optimizer.state[model[0].bias] = dict(entries)
    tensors, scalars = flatten_optimizer(optimizer, named(model))
    restored = OPTIMIZERS["sgd"](model)
    restore_optimizer(restored, named(model), tensors, json.loads(json.dumps(scalars)))
    assert restored.state[model[0].bias] == entries
