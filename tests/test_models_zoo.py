"""The tiny models are what the other tests take them for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.models_zoo import ARCHITECTURES, VOCAB, WINDOW, tiny_config, tiny_model

WINDOWED = ("mistral", "gemma2", "gemma3_text")
DOCUMENT = torch.arange(3, 3 + 2 * WINDOW)[None]  # int64 [1, 16]


def logits_of(model: PreTrainedModel, ids: Tensor = DOCUMENT) -> Tensor:
    with torch.no_grad():
        return model(ids).logits[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_are_finite_and_spread(arch: str) -> None:
    logits_TV = logits_of(tiny_model(arch))
    assert logits_TV.shape == (2 * WINDOW, VOCAB)
    assert logits_TV.dtype == torch.float32
    assert bool(logits_TV.isfinite().all())
    assert float(logits_TV.std()) > 0.1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_first_token_reaches_the_last_position(arch: str) -> None:
    """Two windows of full depth cover 2 * (WINDOW - 1) positions, full attention all of them."""
    changed = DOCUMENT.clone()
    changed[0, 0] = VOCAB - 1
    model = tiny_model(arch)
    difference = (logits_of(model) - logits_of(model, changed)).abs().amax(-1)
    assert float(difference[WINDOW - 1]) > 1e-3


@pytest.mark.parametrize("arch", WINDOWED)
def test_the_window_is_active(arch: str) -> None:
    model, wide = tiny_model(arch), tiny_model(arch, sliding_window=10 * WINDOW)
    difference = (logits_of(model) - logits_of(wide)).abs().amax(-1)
    assert float(difference[: WINDOW - 1].max()) < 1e-5
    assert float(difference[-1]) > 1e-3


@pytest.mark.parametrize("option", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_soft_capping_of_gemma2_is_active(option: str) -> None:
    capped, free = tiny_model("gemma2"), tiny_model("gemma2", **{option: None})
    assert float((logits_of(capped) - logits_of(free)).abs().max()) > 1e-3


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    first = tiny_model("llama", seed=3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second, third = tiny_model("llama", seed=3), tiny_model("llama", seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), third.parameters(), strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_configuration_has_dropout(arch: str) -> None:
    """`classifier_dropout` and `summary_first_dropout` belong to heads that a causal model does not have."""
    fields = tiny_config(arch).to_dict()
    rates = {
        name: rate
        for name, rate in fields.items()
        if "drop" in name and not name.startswith(("classifier", "summary"))
    }
    assert rates
    assert not any(rates.values()), rates
