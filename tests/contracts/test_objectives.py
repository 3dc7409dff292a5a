"""One grid for every objective: what the engine relies on when it adds them up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from ftlib.batches import Group, PackedBatch
from ftlib.data import collate
from ftlib.models import forward
from ftlib.models.references import FrozenCopy
from ftlib.objectives import DPO, SFT, Objective, OfOneForward, Prepared, Reward, weighted
from tests.models_zoo import tiny_config, tiny_model
from tests.packed import random_groups

SHAPES = [(4, (3, 5)), (0, (4, 2)), (6, (2, 2)), (3, (7, 1)), (1, (5, 6))]


def policy() -> nn.Module:
    return tiny_model("llama")


def scorer() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = tiny_config("llama", num_labels=1)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return model.eval()


@dataclass(frozen=True)
class Case:
    """An objective, and the model it is for."""

    objective: Any  # a function: references are made per test
    model: Any = policy


def reference() -> FrozenCopy:
    return FrozenCopy(tiny_model("llama", seed=1))


CASES = {
    "sft": Case(SFT),
    "reward": Case(lambda: Reward(center=0.1), scorer),
    "dpo": Case(lambda: DPO(reference())),
    "dpo without reference": Case(lambda: DPO(None)),
    "conservative dpo": Case(lambda: DPO(reference(), label_smoothing=0.1)),
    "robust": Case(lambda: DPO(reference(), loss="robust", label_smoothing=0.1)),
    "hinge": Case(lambda: DPO(reference(), loss="hinge")),
    "ipo": Case(lambda: DPO(reference(), loss="ipo")),
    "literal ipo": Case(lambda: DPO(reference(), loss="ipo", ipo_reduction="sum")),
    "weighted": Case(lambda: weighted({DPO(reference()): 1.0, SFT(): 0.1})),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Objective, nn.Module]:
    chosen = CASES[request.param]
    return chosen.objective(), chosen.model()


def groups() -> list[Group]:
    return random_groups(SHAPES)


def added(parts: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}


def stepped(
    objective: Objective, model: nn.Module, batches: list[PackedBatch]
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one step of these micro-batches."""
    model.zero_grad()
    counts = added([objective.counts(batch) for batch in batches])
    losses = []
    for batch in batches:
        losses.append(objective(model, batch).loss(counts))
        losses[-1].backward()
    return torch.stack(losses).sum().detach(), [
        torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
        for weight in model.parameters()
    ]


def test_counts_are_those_of_the_terms(case):
    objective, model = case
    batch = collate(groups())
    terms = objective(model, batch).terms
    counts = objective.counts(batch)
    assert list(counts) == list(terms)
    for name, mean in terms.items():
        assert_close(counts[name], mean.count)
        assert counts[name].shape == mean.sum.shape == ()
        assert mean.sum.dtype == torch.float32


def test_only_the_sums_of_terms_carry_gradient(case):
    objective, model = case
    output = objective(model, collate(groups()))
    assert all(mean.sum.requires_grad and not mean.count.requires_grad for mean in output.terms.values())
    assert not any(mean.sum.requires_grad or mean.count.requires_grad for mean in output.metrics.values())


@pytest.mark.parametrize("cut", [1, 3])
def test_any_split_has_the_same_loss_and_gradients(case, cut):
    objective, model = case
    whole, whole_grads = stepped(objective, model, [collate(groups())])
    parts, parts_grads = stepped(objective, model, [collate(groups()[:cut]), collate(groups()[cut:])])
    assert float(torch.stack([grad.norm() for grad in whole_grads]).norm()) > 0
    assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    for part, grad in zip(parts_grads, whole_grads, strict=True):
        assert_close(part, grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))


@pytest.mark.parametrize("cut", [1, 3])
def test_metrics_add_up_over_any_split(case, cut):
    objective, model = case
    whole, left, right = (
        objective(model, collate(part)).metrics for part in (groups(), groups()[:cut], groups()[cut:])
    )
    for name, mean in whole.items():
        assert_close((left[name] + right[name]).sum, mean.sum, rtol=1e-5, atol=1e-5)
        assert_close((left[name] + right[name]).count, mean.count)


def test_the_order_of_the_groups_does_not_matter(case):
    objective, model = case
    forwards, backwards = (
        stepped(objective, model, [collate(order)])[0] for order in (groups(), groups()[::-1])
    )
    assert_close(forwards, backwards, rtol=1e-5, atol=1e-6)


def test_a_batch_without_loss_weights_adds_nothing(case):
    """What a rank computes that has no examples left."""
    objective, model = case
    empty = [
        replace(one, continuation_weights=tuple(map(torch.zeros_like, one.continuation_weights)))
        for one in groups()[:2]
    ]
    alone, alone_grads = stepped(objective, model, [collate(groups())])
    beside, beside_grads = stepped(objective, model, [collate(groups()), collate(empty)])
    assert torch.equal(alone, beside)
    assert all(torch.equal(one, two) for one, two in zip(alone_grads, beside_grads, strict=True))
    assert all(count == 0 for count in objective.counts(collate(empty)).values())


@pytest.mark.parametrize("name", [name for name in CASES if name != "weighted"])
def test_calling_is_of_after_one_forward(name):
    objective, model = CASES[name].objective(), CASES[name].model()
    assert isinstance(objective, OfOneForward)
    batch = collate(groups())
    prepared = objective.prepare(batch) if isinstance(objective, Prepared) else batch
    needs = objective.needs
    scored = forward(model, batch, entropy=needs.entropy, hidden=needs.hidden, scores=needs.scores)
    output, called = objective.of(scored, prepared), objective(model, batch)
    for name, mean in called.terms.items():
        assert torch.equal(output.terms[name].sum, mean.sum)
    for name, mean in called.metrics.items():
        assert torch.equal(output.metrics[name].sum, mean.sum)


def test_an_objective_does_not_change_the_batch(case):
    objective, model = case
    batch = collate(groups())
    before = {name: getattr(batch, name).clone() for name in ("ids_T", "weights_N", "owner_N")}
    objective(model, batch)
    assert dict(batch.extras) == {}
    assert all(torch.equal(getattr(batch, name), value) for name, value in before.items())
