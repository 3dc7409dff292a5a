"""A classifier with virtual tokens, called by itself: the scores that trainers see, whatever the padding."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from peft.peft_model import PeftModelForSequenceClassification
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from ftlib.adapters import attach, lora, stack
from ftlib.batches import Group
from ftlib.data.collate import collate
from ftlib.errors import ConfigError
from ftlib.models import adapters_off, forward
from tests.encoders import encoder
from tests.models_zoo import tiny_model
from tests.trainers.preferences import moved
from tests.virtual import COUNT, SOFT

CLOSE = {"rtol": 1e-5, "atol": 2e-5}
PAD, CLS = 0, 2
ROWS = [[CLS, 7, 9, 11, 8, 3], [CLS, 12, 3], [CLS, 10, 3, 6, 9, 5, 8, 7, 3]]
KINDS = [kind for kind in SOFT if not kind.startswith("prefix")]
PADDED = [
    *product(("llama", "gpt2", "opt"), ("left", "right")),
    *product(("bert", "roberta"), ("right",)),
]


def plain(arch: str) -> Any:
    if arch in ("bert", "roberta"):
        return encoder(arch)
    torch.manual_seed(0)
    return tiny_model(arch, auto=AutoModelForSequenceClassification, num_labels=3, pad_token_id=PAD)


def soft(arch: str, adapter: Any) -> Any:
    base = plain(arch)
    torch.manual_seed(0)
    return moved(attach(base, adapter)).eval()


def padded(model: Any, side: str) -> dict[str, Tensor]:
    """Rows of the longest length, and where their text is."""
    longest, pad = max(map(len, ROWS)), model.config.pad_token_id
    pads = [[pad] * (longest - len(row)) for row in ROWS]
    both = zip(pads, ROWS, strict=True)
    ids = [[*empty, *row] if side == "left" else [*row, *empty] for empty, row in both]
    ones = [[1] * len(row) for row in ROWS]
    mask = [
        [*([0] * len(empty)), *one] if side == "left" else [*one, *([0] * len(empty))]
        for empty, one in zip(pads, ones, strict=True)
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def expected(model: Any) -> Tensor:
    """By the forward of trainers."""
    none = torch.tensor([]).long()
    groups = [Group(none, none.float(), (torch.tensor(row),), (torch.ones(len(row)),)) for row in ROWS]
    scores = forward(model, collate(groups, score_all=True), scores=True).scores_CK
    assert scores is not None
    return scores


@pytest.mark.parametrize(("arch", "side"), PADDED)
def test_f3_rows_padded_on_either_side_have_the_scores_of_the_trainers_forward(arch: str, side: str) -> None:
    """An encoder's rows begin with the token that it pools, so they are padded on the right."""
    model = soft(arch, SOFT["prompt"]())
    rows = padded(model, side)
    assert_close(model(**rows).logits, expected(model), **CLOSE)
    assert_close(model(rows["input_ids"], rows["attention_mask"]).logits, expected(model), **CLOSE)
    peft = PeftModelForSequenceClassification.forward(model, **rows).logits
    as_peft = (arch, side) == ("opt", "left")  # it counts positions by the mask, virtual tokens first
    assert (float((peft - expected(model)).abs().max().detach()) < 1e-5) is as_peft


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["llama", "bert"])
def test_every_kind_scores_and_learns_as_in_the_trainers_forward(arch: str, kind: str) -> None:
    model, labels = soft(arch, SOFT[kind]()), torch.tensor([0, 2, 1])
    output = model(**padded(model, "right"), labels=labels)
    assert_close(output.loss, cross_entropy(expected(model), labels))
    output.loss.backward()
    assert all(w.grad is not None and w.grad.any() for w in model.parameters() if w.requires_grad)


def test_a_row_alone_needs_no_mask_and_segments_follow_the_text() -> None:
    model = soft("bert", SOFT["prompt"]())
    ids = torch.tensor(ROWS[2])[None]
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    group = Group(ids[0, :3], torch.zeros(3), (ids[0, 3:],), (torch.ones(6),))
    found = forward(model, collate([group], score_all=True), scores=True).scores_CK
    assert_close(model(ids, token_type_ids=segments).logits, found, **CLOSE)
    embeds = model.get_base_model().get_input_embeddings()(ids)
    assert_close(model(inputs_embeds=embeds, token_type_ids=segments).logits, found, **CLOSE)


def test_weights_beneath_take_part_and_switched_off_it_is_the_base() -> None:
    model = soft("llama", stack(SOFT["prompt"](), lora(4)))
    rows = padded(model, "right")
    assert_close(model(**rows).logits, expected(model), **CLOSE)
    with adapters_off(model):
        assert torch.equal(model(**rows).logits, plain("llama")(**rows).logits)


def test_positions_and_rows_given_twice_are_refused() -> None:
    model, ids = soft("llama", SOFT["prompt"]()), torch.tensor(ROWS[0])[None]
    for wrong in ({"position_ids": torch.arange(6)[None]}, {"inputs_embeds": torch.zeros(1, 6, 32)}):
        with pytest.raises(ConfigError, match="expected input_ids or inputs_embeds, and no position_ids"):
            model(ids, **wrong)


def test_positions_of_virtual_tokens_come_first() -> None:
    """A row of n + L positions and no more: the last text token stands at n + L - 1."""
    model = soft("gpt2", SOFT["prompt"]())
    seen: list[Tensor] = []
    handle = model.get_base_model().base_model.register_forward_pre_hook(
        lambda _, args, options: seen.append(options["position_ids"]), with_kwargs=True
    )
    model(**padded(model, "right"))
    handle.remove()
    assert seen[0][:, -1].tolist() == [COUNT + len(row) - 1 for row in ROWS]
