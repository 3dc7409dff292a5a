"""Grouped attention equals dense softmax under a visibility mask, and is active in the forward only.

Shapes: T tokens, H query heads, K key heads, D head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ftlib.batches import Span
from ftlib.errors import CapabilityError
from ftlib.models import attention as attention_module
from ftlib.models.attention import NAME, attend, attend_plain, grouped_attention, grouped_scope
from ftlib.models.forward import forward
from ftlib.models.layout import GroupLayout
from ftlib.models.plan import plan_for
from tests.models.test_layout import visibility
from tests.models_zoo import ARCHITECTURES, VOCAB, tiny_model
from tests.packed import random_batch

SPANS = (Span(0, 0, (7,)), Span(7, 4, (3,)), Span(14, 5, (2, 6)), Span(27, 0, (1, 2)))
T, D = SPANS[-1].stop, 4
CASES = [
    pytest.param(window, softcap, heads, id=f"window={window}-softcap={softcap}-heads={heads}")
    for window in (None, 1, 3, 20)
    for softcap in (None, 0.8)
    for heads in ((2, 2), (6, 2), (3, 1))
]


def random_qkv(heads: tuple[int, int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query_heads, key_heads = heads
    q, k, v = (
        torch.randn(count, T, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for count in (query_heads, key_heads, key_heads)
    )
    return q, k, v


def dense(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, window: int | None, softcap: float | None) -> Tensor:
    """Every score of the flat row, the forbidden ones masked out. [T, H, D]."""
    shared = len(q_HTD) // len(k_KTD)
    scores_HTT = q_HTD @ k_KTD.repeat_interleave(shared, 0).mT * D**-0.5
    if softcap is not None:
        scores_HTT = softcap * torch.tanh(scores_HTT / softcap)
    scores_HTT = scores_HTT.masked_fill(~visibility(SPANS, window), float("-inf"))
    return (scores_HTT.softmax(-1) @ v_KTD.repeat_interleave(shared, 0)).transpose(0, 1)


def value_and_gradients(output_THD: Tensor, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    upstream = torch.randn(output_THD.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((output_THD * upstream.to(output_THD.dtype)).sum(), inputs)
    return [output_THD.detach(), *gradients]


@pytest.fixture(params=["one tile per run", "tiles of two rows, nothing kept"])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long documents go through several tiles and rebuild probabilities; make short ones do so too."""
    if "two" in request.param:
        monkeypatch.setattr(attention_module, "BLOCK", 2)
        monkeypatch.setattr(attention_module, "KEPT", 0)


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize(("window", "softcap", "heads"), CASES)
def test_equals_dense_attention_under_the_visibility_mask(
    window: int | None, softcap: float | None, heads: tuple[int, int]
) -> None:
    qkv, layout = random_qkv(heads), GroupLayout(SPANS)
    expected = value_and_gradients(dense(*qkv, window, softcap), qkv)
    for function in (attend, attend_plain):
        found = value_and_gradients(function(*qkv, layout, D**-0.5, window, softcap), qkv)
        assert_close(found, expected)


@pytest.mark.usefixtures("tiling")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, 0.8)])
def test_gradients_are_those_of_finite_differences(window: int | None, softcap: float | None) -> None:
    qkv, layout = random_qkv((4, 2)), GroupLayout(SPANS)
    assert torch.autograd.gradcheck(
        lambda *qkv: attend(*qkv, layout, 0.3, window, softcap), qkv, fast_mode=True
    )


def test_the_plain_form_can_be_differentiated_twice() -> None:
    q, k, v = random_qkv((2, 1))
    layout = GroupLayout((Span(0, 2, (2, 3)),))
    small = tuple(x.detach()[:, :7].requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradgradcheck(
        lambda *qkv: attend_plain(*qkv, layout, 0.3, None, 0.8), small, fast_mode=True
    )


def test_bf16_agrees_with_float64_to_its_precision() -> None:
    """Some ten roundings of 2 ** -9 lie between the input and each result."""
    precise, rough = random_qkv((4, 2)), random_qkv((4, 2), torch.bfloat16)
    layout = GroupLayout(SPANS)
    expected = value_and_gradients(attend(*precise, layout, D**-0.5), precise)
    found = value_and_gradients(attend(*rough, layout, D**-0.5), rough)
    for name, ours, exact in zip("oqkv", found, expected, strict=True):
        error = float((ours.double() - exact).norm() / exact.norm())
        assert error < 10 * 2**-9, name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"groups": None}, "no `groups`"),
        ({"attention_mask": torch.ones(1, 1, T, T)}, "an attention mask"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(2)}, "position_bias"),
        ({"is_causal": False}, "is_causal=False"),
    ],
)
def test_what_would_change_scores_is_refused(changes: dict[str, Any], words: str) -> None:
    q, k, v = (x[None] for x in random_qkv((2, 2)))
    options: dict[str, Any] = {"attention_mask": None, "groups": GroupLayout(SPANS)} | changes
    with pytest.raises(CapabilityError, match=words):
        grouped_attention(nn.Identity(), q, k, v, **options)


def test_dropout_drops_and_keeps_the_mean() -> None:
    """Each probability survives with 1 - p and is scaled by 1 / (1 - p): over 2000 draws the mean returns.

    One draw deviates by less than 2, so the mean of 2000 by less than 0.05: four of these are allowed.
    """
    q, k, v = (x.detach().float()[None] for x in random_qkv((2, 2)))
    layout = GroupLayout(SPANS)

    def output(dropout: float) -> Tensor:
        return grouped_attention(nn.Identity(), q, k, v, None, groups=layout, dropout=dropout)[0]

    kept = output(0.0)
    draws = torch.stack([output(0.5) for _ in range(2000)])
    alone = 0  # a query that sees one key: its output is 0 or twice that key's value
    assert bool(((draws[:, 0, alone] == 0) | draws[:, 0, alone].isclose(2 * kept[0, alone])).all())
    assert_close(draws.mean(0), kept, atol=0.2, rtol=0)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_attention_dropout_acts_in_training_only(arch: str) -> None:
    name = "attn_pdrop" if arch == "gpt2" else "attention_dropout"
    model, exact, batch = tiny_model(arch, **{name: 0.3}), tiny_model(arch), random_batch()
    assert_close(forward(model, batch).logprobs_N, forward(exact, batch).logprobs_N)
    model.train()
    first, second = forward(model, batch).logprobs_N, forward(model, batch).logprobs_N
    assert float((first - second).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_group_changes_nothing_in_another(arch: str) -> None:
    """Bitwise: other tokens in the second group leave the log-probabilities of the rest as they were."""
    model, batch = tiny_model(arch), random_batch()
    span = batch.spans[1]
    ids_T = batch.ids_T.clone()
    ids_T[span.start : span.stop] = (ids_T[span.start : span.stop] + 1) % VOCAB
    changed = replace(batch, ids_T=ids_T)
    with torch.no_grad():
        before_N, after_N = (forward(model, x).logprobs_N for x in (batch, changed))
    inside_N = (batch.rows_N >= span.start) & (batch.rows_N < span.stop)
    assert torch.equal(before_N[~inside_N], after_N[~inside_N])
    assert not before_N[inside_N].isclose(after_N[inside_N], atol=1e-3).any()


def plain_results(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits of a padded batch, and greedy tokens after a prompt."""
    ids_BL = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 0, 0, 0]])
    mask_BL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    greedy = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        logits = model(input_ids=ids_BL, attention_mask=mask_BL).logits[mask_BL.bool()]
        tokens = model.generate(input_ids=ids_BL[:1], attention_mask=mask_BL[:1], generation_config=greedy)
    return logits, tokens


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt2"])
def test_a_grouped_forward_leaves_no_trace(arch: str, attention: str) -> None:
    used, fresh = (tiny_model(arch, attention=attention) for _ in range(2))
    forward(used, random_batch()).logprobs_N.sum().backward()
    assert used.config._attn_implementation == attention
    for ours, expected in zip(plain_results(used), plain_results(fresh), strict=True):
        assert torch.equal(ours, expected)


def test_an_exception_inside_the_forward_leaves_no_trace() -> None:
    used, fresh = tiny_model(), tiny_model()
    plan_for(used)
    names = []

    def fail(*_: object) -> None:
        names.append(used.config._attn_implementation)
        raise ArithmeticError("inside")

    handle = used.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(ArithmeticError, match="inside"):
        forward(used, random_batch())
    handle.remove()
    assert names == [NAME]
    assert used.config._attn_implementation == "eager"
    for ours, expected in zip(plain_results(used), plain_results(fresh), strict=True):
        assert torch.equal(ours, expected)


def test_parts_of_a_composite_configuration_get_their_own_names_back() -> None:
    config = CONFIG_MAPPING["gemma3"]()
    config._attn_implementation = {"": "eager", "text_config": "sdpa", "vision_config": "eager"}
    parts = (config, config.text_config, config.vision_config)
    with grouped_scope(config):
        assert [part._attn_implementation for part in parts] == [NAME] * 3
    assert [part._attn_implementation for part in parts] == ["eager", "sdpa", "eager"]
