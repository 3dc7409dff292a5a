"""What several objectives need of one forward."""

from __future__ import annotations

import pytest
import torch

from ftlib.models import Scorer, forward
from ftlib.objectives import Needs
from tests.models_zoo import tiny_model
from tests.packed import random_batch

VALUE, GRADIENT = Needs(entropy=True), Needs(entropy="gradient")


def test_together_they_need_what_either_does() -> None:
    assert Needs(hidden=True) | Needs(values=True) == Needs(hidden=True, values=True)
    assert Needs() | Needs() == Needs()


@pytest.mark.parametrize("other", [Needs(), VALUE, GRADIENT])
def test_a_gradient_of_the_entropy_serves_those_who_read_its_value(other: Needs) -> None:
    assert GRADIENT | other == other | GRADIENT == GRADIENT
    assert VALUE | Needs() == Needs() | VALUE == VALUE


@pytest.mark.parametrize("path", ["grouped", "padded"])
def test_the_forward_gives_the_entropy_as_it_is_needed(path: str) -> None:
    model, batch = tiny_model(), random_batch()
    scorer = Scorer(model, path=path)  # type: ignore[arg-type]
    value, graded = (forward(scorer, batch, entropy=needs.entropy).entropy_N for needs in (VALUE, GRADIENT))
    assert value is not None
    assert graded is not None
    assert torch.equal(value, graded.detach())
    assert not value.requires_grad
    weights = list(model.parameters())
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(graded.sum(), weights))
