"""Optimiser, schedule and masters do what the configuration says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ftlib.engine import TrainConfig
from ftlib.engine.optim import Masters, make_optimizer, make_schedule
from ftlib.errors import ConfigError
from tests.models_zoo import tiny_model
from tests.trainers.tiny import rows, sft

RATE, STEPS = 1.0, 10


def named() -> dict[str, nn.Parameter]:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    return dict(model.named_parameters())


def rates(steps: int = STEPS, **options) -> list[float]:
    """Learning rate of every step."""
    config = TrainConfig(**options)
    optimizer = make_optimizer(config, named(), RATE)
    schedule = make_schedule(config, optimizer, steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_linear_falls_by_equal_amounts_and_ends_one_before_zero():
    assert rates(schedule="linear") == pytest.approx([1 - step / STEPS for step in range(STEPS)])


def test_constant_stays():
    assert rates(schedule="constant") == [RATE] * STEPS


def test_warmup_below_one_is_a_share_of_all_steps():
    assert rates(schedule="constant", warmup=0.2) == pytest.approx([0, 0.5] + [1] * 8)


def test_warmup_from_one_on_is_a_number_of_steps():
    assert rates(schedule="constant", warmup=2) == rates(schedule="constant", warmup=0.2)
    assert rates(schedule="linear", warmup=1)[:2] == [0, RATE]


def test_cosine_is_half_way_down_in_the_middle():
    assert rates(schedule="cosine")[STEPS // 2] == pytest.approx(0.5)


def test_a_schedule_of_ones_own():
    halve = lambda optimizer, steps: torch.optim.lr_scheduler.StepLR(optimizer, steps // 2, 0.5)  # noqa: E731
    assert rates(schedule=halve) == [1.0] * 5 + [0.5] * 5


def test_a_schedule_that_needs_settings_of_its_own_is_refused():
    with pytest.raises(ConfigError, match=r"cosine_with_min_lr.*Give a function"):
        rates(schedule="cosine_with_min_lr")


@pytest.mark.parametrize(("name", "wanted"), [("schedule", "LRScheduler"), ("optimizer", "torch optimizer")])
def test_a_function_that_makes_something_else_is_refused(name, wanted):
    with pytest.raises(ConfigError, match=f"{name}: expected a {wanted}|{name}: expected a torch {wanted}"):
        rates(**{name: lambda *_: "no"})


def test_weight_decay_leaves_biases_and_norms():
    parameters = named()
    optimizer = make_optimizer(TrainConfig(weight_decay=0.1), parameters, RATE)
    decay = {id(w): group["weight_decay"] for group in optimizer.param_groups for w in group["params"]}
    assert {name: decay[id(weight)] for name, weight in parameters.items()} == {
        "0.weight": 0.1,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


def test_an_optimizer_of_ones_own_gets_the_same_groups_and_the_rate():
    got = []

    def make(groups, rate):
        got.append(([len(group["params"]) for group in groups], rate))
        return torch.optim.SGD(groups, rate)

    assert isinstance(make_optimizer(TrainConfig(optimizer=make), named(), RATE), torch.optim.SGD)
    assert got == [([1, 3], RATE)]


def test_adam_gets_its_options():
    [group, *_] = make_optimizer(TrainConfig(betas=(0.8, 0.9), eps=1e-5), named(), RATE).param_groups
    assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.9), 1e-5, RATE)


@pytest.mark.parametrize(("adapter", "rate"), [("lora", 2e-4), ("full", 2e-5)])
def test_the_learning_rate_left_open_is_that_of_the_way_of_training(adapter, rate):
    assert (
        sft(adapter=adapter, learning_rate=None, schedule="constant").step(rows(2))["learning_rate"] == rate
    )


def test_a_float32_weight_is_its_own_master():
    weight = nn.Parameter(torch.ones(2))
    masters = Masters({"w": weight})
    assert masters.named["w"] is weight
    assert not masters.separate


def test_gradients_of_bfloat16_weights_add_up_in_float32():
    """1 + 2 ** -9 is 1 in bfloat16: the small gradient of a second micro-batch would be lost."""
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    masters = Masters({"w": weight})
    for gradient in (1.0, 2**-9):
        weight.grad = torch.tensor([gradient], dtype=torch.bfloat16)
        masters.collect()
    assert weight.grad is None
    assert masters.named["w"].grad.item() == 1 + 2**-9


def test_loading_sets_masters_and_weights():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    masters = Masters({"w": weight})
    masters.load({"w": torch.tensor([1 + 2**-10])})
    assert masters.copies()["w"].item() == 1 + 2**-10
    assert weight.item() == 1


def test_masters_follow_weights_that_others_wrote():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    masters = Masters({"w": weight})
    with torch.no_grad():
        weight.fill_(2.0)
    masters.follow()
    masters.publish()
    assert weight.item() == masters.copies()["w"].item() == 2


def test_masters_keep_what_bfloat16_cannot_where_a_weight_was_written_as_it_was():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    masters = Masters({"w": weight})
    masters.load({"w": torch.tensor([1 + 2**-10])})
    with torch.no_grad():
        weight.copy_(weight.clone())
    masters.follow()
    assert masters.copies()["w"].item() == 1 + 2**-10


def test_two_trainers_of_one_bfloat16_model_do_not_undo_each_other():
    model = tiny_model("llama")
    still = sft(adapter="full", model=model, dtype=torch.bfloat16, learning_rate=0.0)
    still.step(rows(2))
    moving = sft(adapter="full", model=model, dtype=torch.bfloat16, learning_rate=0.1)
    moving.step(rows(2))
    moved = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    still.step(rows(2))
    for name, weight in model.named_parameters():
        assert torch.equal(weight, moved[name]), name
