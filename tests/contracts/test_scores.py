"""The score of a continuation is its own: alone, packed, padded, and as transformers pools it.

For every architecture with a class for sequence classification, in float32 to 1e-5 of the size.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ftlib.adapters import attach, lora
from ftlib.batches import Group
from ftlib.data.collate import collate
from ftlib.models import Scorer, forward
from ftlib.models.parts import Path
from ftlib.models.plan import plan_for
from tests.models_zoo import ARCHITECTURES, tiny_model
from tests.packed import random_batch, random_groups

PATHS: tuple[Path, ...] = ("grouped", "padded")
LABELS = 3  # more than a reward model's one, so that an axis mistake shows
GROUPS, BATCH = random_groups(), random_batch()
COEFFICIENTS_CK = torch.randn(BATCH.continuations, LABELS, generator=torch.Generator().manual_seed(5))


def full(arch: str) -> nn.Module:
    return tiny_model(arch, auto=AutoModelForSequenceClassification, num_labels=LABELS).requires_grad_(True)


def adapted(arch: str) -> nn.Module:
    """LoRA whose second factor is not zero, so that both factors have a gradient."""
    torch.manual_seed(0)
    model = attach(full(arch), lora(r=2))  # type: ignore[arg-type]
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    return model


def own_scores(model: nn.Module, groups: list[Group] = GROUPS) -> Tensor:
    """Transformers' own, from one unpadded row at a time."""
    rows = [torch.cat([group.prefix_ids, ids])[None] for group in groups for ids in group.continuation_ids]
    return torch.cat([model(input_ids=row_1L).logits for row_1L in rows])


def gradients(model: nn.Module, scores_CK: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (COEFFICIENTS_CK * scores_CK).sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("make", [full, adapted], ids=["all weights", "adapter"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_both_paths_equal_transformers_own_scores(arch: str, make: Callable[[str], nn.Module]) -> None:
    model = make(arch)
    assert plan_for(model).path == "grouped"
    own_CK = own_scores(model)
    expected = gradients(model, own_CK)
    size = torch.stack([x.norm() for x in expected.values()]).norm()
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == set(expected)
    for path in PATHS:
        scored = forward(model, BATCH, scores=True, path=path)
        assert scored.scores_CK is not None
        assert_close(scored.scores_CK, own_CK, rtol=1e-5, atol=1e-5)
        assert scored.logprobs_N.shape == (0,)
        found = gradients(model, scored.scores_CK)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert float((found[name] - value).norm()) <= 1e-5 * float(size), name


def scorer(**changes: object) -> PreTrainedModel:
    return tiny_model(auto=AutoModelForSequenceClassification, num_labels=1, **changes)


def test_a_score_is_that_of_its_row_alone() -> None:
    model = scorer()
    together_CK = forward(model, BATCH, scores=True).scores_CK
    alone = [forward(model, collate([group], score_all=True), scores=True).scores_CK for group in GROUPS]
    assert_close(torch.cat(alone), together_CK, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]


def test_neighbours_in_the_group_change_nothing() -> None:
    model, last = scorer(), GROUPS[-1]
    whole_CK = forward(model, collate([last]), scores=True).scores_CK
    assert whole_CK is not None
    for number, ids in enumerate(last.continuation_ids):
        single = Group(last.prefix_ids, last.prefix_weights, (ids,), (last.continuation_weights[number],))
        scores_CK = forward(model, collate([single]), scores=True).scores_CK
        assert_close(scores_CK, whole_CK[number : number + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad", [None, 2, int(BATCH.ids_T[-1])], ids=["none", "eos", "a row's last token"])
def test_no_pad_id_is_ever_looked_at(pad: int | None) -> None:
    expected_CK = forward(scorer(), BATCH, scores=True).scores_CK
    for path in PATHS:
        scored = forward(scorer(pad_token_id=pad), BATCH, scores=True, path=path)
        assert_close(scored.scores_CK, expected_CK, rtol=1e-5, atol=1e-5)


def test_rows_need_no_weight_to_be_scored() -> None:
    """A prefix of any weight, and continuations of which no token is trained."""
    group = GROUPS[1]
    bare = Group(group.prefix_ids, group.prefix_weights, group.continuation_ids, (torch.zeros(3),))
    assert_close(
        forward(scorer(), collate([bare]), scores=True).scores_CK,
        forward(scorer(), collate([group]), scores=True).scores_CK,
    )


@torch.no_grad()
@pytest.mark.parametrize("body", [torch.bfloat16, torch.float16])
def test_a_float32_head_on_a_half_precision_body_gives_float32_scores(body: torch.dtype) -> None:
    model = scorer()
    exact_CK = forward(scorer(), BATCH, scores=True).scores_CK
    model.model.to(body)
    for path in PATHS:
        scores_CK = forward(model, BATCH, scores=True, path=path).scores_CK
        assert scores_CK.dtype == torch.float32
        assert not torch.equal(scores_CK.to(body).float(), scores_CK)  # more digits than the body has
        assert float((scores_CK - exact_CK).norm() / exact_CK.norm()) < 0.05  # the body's own rounding
    with torch.autocast("cpu", body):
        assert forward(model, BATCH, scores=True).scores_CK.dtype == torch.float32  # type: ignore[union-attr]


def test_a_scorer_and_its_wrapper_give_the_same() -> None:
    model = scorer()
    expected_CK = forward(model, BATCH, scores=True).scores_CK
    wrapped = torch.nn.parallel.DataParallel(Scorer(model), device_ids=[])
    assert torch.equal(forward(wrapped, BATCH, scores=True).scores_CK, expected_CK)  # type: ignore[arg-type]
