"""Flat and grouped equals padded equals the model's own logits, one continuation at a time.

For every architecture: log-probabilities, last hidden states, and gradients of all weights and of
adapters, in float32 to 1e-5 of their size.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ftlib.adapters import attach, lora
from ftlib.batches import Group
from ftlib.data.collate import collate
from ftlib.models import Scored, forward
from ftlib.models.parts import Path
from ftlib.models.plan import plan_for
from tests.models_zoo import ARCHITECTURES, EOS, PAD, tiny_model
from tests.packed import MIXED, Shape, own_logprobs, random_batch, random_groups

PATHS: tuple[Path, ...] = ("grouped", "padded")
COEFFICIENTS_N = torch.randn(random_batch().rows_N.shape, generator=torch.Generator().manual_seed(5))


def full(arch: str) -> nn.Module:
    return tiny_model(arch).requires_grad_(True)


def adapted(arch: str) -> nn.Module:
    """LoRA whose second factor is not zero, so that both factors have a gradient."""
    torch.manual_seed(0)
    model = attach(tiny_model(arch), lora(r=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return model


def gradients(model: nn.Module, logprobs_N: Tensor, last_CD: Tensor) -> dict[str, Tensor]:
    """Of an arbitrary function of both outputs: signed coefficients, and the states' squares."""
    model.zero_grad()
    ((COEFFICIENTS_N * logprobs_N).sum() + (last_CD**2).sum() / 100).backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_equal_to_their_size(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every tensor differs by less than 1e-5 of the norm of all."""
    assert found.keys() == expected.keys()
    size = torch.stack([x.norm() for x in expected.values()]).norm()
    assert float(size) > 1e-2
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 1e-5 * float(size), name


@pytest.mark.parametrize("make", [full, adapted], ids=["all weights", "adapter"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_both_paths_equal_the_models_own_logits(arch: str, make: Callable[[str], nn.Module]) -> None:
    model, groups, batch = make(arch), random_groups(), random_batch()
    assert plan_for(model).path == "grouped"
    own = own_logprobs(model, groups)
    expected = gradients(model, own.logprobs_N, own.last_CD)
    for path in PATHS:
        scored = forward(model, batch, hidden=True, path=path)
        assert scored.last_CD is not None
        found = gradients(model, scored.logprobs_N, scored.last_CD)
        assert_close(scored.logprobs_N, own.logprobs_N, rtol=1e-5, atol=1e-5)
        assert_close(scored.last_CD, own.last_CD, rtol=1e-5, atol=1e-5)
        assert_equal_to_their_size(found, expected)


@pytest.mark.parametrize("continuations", [1, 2, 8])
@pytest.mark.parametrize("prefix", [0, 1, 40], ids=["no prefix", "one token", "far longer"])
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_any_prefix_and_any_number_of_continuations(arch: str, prefix: int, continuations: int) -> None:
    model, shapes = tiny_model(arch), [(prefix, tuple(range(2, 2 + continuations)))] * 2
    own = own_logprobs(model, random_groups(shapes), temperature=0.7)
    for path in PATHS:
        scored = forward(model, random_batch(shapes), temperature=0.7, hidden=True, path=path)
        assert_close(scored.logprobs_N, own.logprobs_N, rtol=1e-5, atol=1e-5)
        assert_close(scored.last_CD, own.last_CD, rtol=1e-5, atol=1e-5)


EIGHT: tuple[Shape, ...] = (*MIXED[:4], (4, (2, 3)), (0, (9,)), (2, (1,)), (10, (3, 3, 3)))
SPLITS = {
    "2 x 4": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "8 x 1": [[number] for number in range(8)],
    "shuffled": [[5, 2, 7, 0, 3, 6, 1, 4]],
    "shuffled 3 + 5": [[6, 1, 4], [0, 7, 2, 5, 3]],
}


def loss_and_gradients(model: nn.Module, batches: list[list[Group]]) -> tuple[float, dict[str, Tensor]]:
    """sum(w nll) / sum(w) over the whole step, however it is cut into micro-batches."""
    model.zero_grad()
    packed = [collate(groups) for groups in batches]
    count, loss = sum(float(batch.weights_N.sum()) for batch in packed), 0.0
    for batch in packed:
        part = -(batch.weights_N * forward(model, batch).logprobs_N).sum() / count
        part.backward()
        loss += float(part.detach())
    return loss, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("split", list(SPLITS))
@pytest.mark.parametrize("make", [full, adapted], ids=["all weights", "adapter"])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
def test_any_split_and_order_has_the_same_loss_and_gradient(
    arch: str, make: Callable[[str], nn.Module], split: str
) -> None:
    model, groups = make(arch), random_groups(EIGHT)
    loss, expected = loss_and_gradients(model, [groups])
    parts = [[groups[number] for number in numbers] for numbers in SPLITS[split]]
    found_loss, found = loss_and_gradients(model, parts)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert_equal_to_their_size(found, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("score_all", [False, True], ids=["no rows", "rows of weight zero"])
def test_a_micro_batch_without_weights_gives_a_finite_zero(path: Path, score_all: bool) -> None:
    model = full("llama")
    silent = [
        Group(
            group.prefix_ids,
            group.prefix_weights,
            group.continuation_ids,
            tuple(map(torch.zeros_like, weights)),
        )
        for group in random_groups()
        for weights in [group.continuation_weights]
    ]
    batch = collate(silent, score_all=score_all)
    loss = -(batch.weights_N * forward(model, batch, path=path).logprobs_N).sum()
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(weight.grad is not None and not weight.grad.any() for weight in model.parameters())


@pytest.mark.parametrize("path", PATHS)
def test_the_pad_token_is_a_token_like_any_other(path: Path) -> None:
    """Nothing is compared with the pad id: text that holds it scores the same whatever the pad id is."""
    group = random_groups([(4, (6,))])[0]
    ids = torch.tensor([5, PAD, EOS, 7, PAD, EOS])
    batch = collate(
        [Group(group.prefix_ids, group.prefix_weights, (ids,), (torch.ones(6),)), *random_groups()]
    )

    def scored(pad: int | None) -> Scored:
        model = tiny_model()
        model.config.pad_token_id = pad
        with torch.no_grad():
            return forward(model, batch, path=path)

    expected_N = scored(PAD).logprobs_N
    for pad in (EOS, None):
        assert torch.equal(scored(pad).logprobs_N, expected_N)
