"""Encoders behind the one forward: every architecture's own scores, whatever else is in the batch."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ftlib import adapters
from ftlib.adapters.encoder_head import encoder_head
from ftlib.data import LabelledEncoder
from ftlib.data.collate import collate
from ftlib.errors import CapabilityError
from ftlib.models import Scorer, forward
from ftlib.models.encoders import first_position
from ftlib.trainers.inputs import context_length
from tests.encoders import CONTEXT, ENCODERS, TEXTS, encoder, encoder_tokenizer
from tests.models_zoo import tiny_model

HEADS = {
    "bert": {"pooler", "classifier"},
    "roberta": {"classifier"},
    "distilbert": {"pre_classifier", "classifier"},
    "modernbert": {"head", "classifier"},
    "electra": {"classifier"},
}


def batch_of(arch, *, pairs=False):
    second = TEXTS[::-1]
    rows = [{"text_a": a, "text_b": b} if pairs else {"text": a} for a, b in zip(TEXTS, second, strict=True)]
    data = LabelledEncoder(encoder_tokenizer(arch))(rows)
    return collate([data[index] for index in range(len(data))])


def own_scores(model, arch, *, pairs=False, side=None):
    """Transformers' own: one row at a time, or padded on one side in one batch."""
    tokenizer = encoder_tokenizer(arch)
    given = (TEXTS, TEXTS[::-1]) if pairs else (TEXTS,)
    with torch.no_grad():
        if side is None:
            rows = [tokenizer(*texts, return_tensors="pt") for texts in zip(*given, strict=True)]
            return torch.cat([model(**row).logits for row in rows])
        padded = tokenizer(*given, padding=True, padding_side=side, return_tensors="pt")
        return model(**padded).logits


def scores(model, batch):
    with torch.no_grad():
        return forward(model, batch, scores=True).scores_CK


@pytest.mark.parametrize("pairs", [False, True], ids=["single", "pairs"])
@pytest.mark.parametrize("arch", ENCODERS)
def test_scores_are_those_of_the_model_on_each_row_alone(arch, pairs):
    model = encoder(arch)
    expected = own_scores(model, arch, pairs=pairs)
    assert float(expected.std()) > 0.05
    assert_close(scores(model, batch_of(arch, pairs=pairs)), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("arch", ENCODERS)
def test_padding_on_the_right_changes_nothing_for_transformers_itself(arch):
    model = encoder(arch)
    assert_close(own_scores(model, arch, side="right"), scores(model, batch_of(arch)), rtol=1e-5, atol=2e-6)


def test_segments_tell_the_two_texts_of_a_pair_apart():
    model, batch = encoder(), batch_of("bert", pairs=True)
    joined = replace(
        batch, spans=tuple(replace(s, prefix=0, continuations=(s.stop - s.start,)) for s in batch.spans)
    )
    assert not torch.allclose(scores(model, batch), scores(model, joined), atol=1e-2)


@pytest.mark.parametrize("arch", ["bert", "roberta", "modernbert"])
def test_neither_neighbours_nor_their_order_change_a_score(arch):
    model = encoder(arch)
    data = LabelledEncoder(encoder_tokenizer(arch))(TEXTS)
    order = [5, 2, 7, 0, 1, 3, 6, 4]
    whole = scores(model, batch_of(arch))
    assert_close(scores(model, collate([data[i] for i in order])), whole[order], rtol=1e-5, atol=2e-6)
    alone = torch.cat([scores(model, collate([data[i]])) for i in range(len(data))])
    assert_close(alone, whole, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("arch", ["bert", "distilbert"])
def test_the_pad_id_changes_nothing(arch):
    """Not even where it is a word of the rows, or the token they end in."""
    model, batch = encoder(arch), batch_of(arch)
    expected = scores(model, batch)
    for pad in (encoder_tokenizer(arch).sep_token_id, int(batch.ids_T[2]), None):
        model.config.pad_token_id = pad
        assert torch.equal(scores(model, batch), expected)


def test_dropout_of_head_and_body_acts_in_training_only():
    model, batch = encoder("bert", dropout=0.5), batch_of("bert")
    expected = scores(encoder("bert"), batch)
    assert_close(scores(model, batch), expected, rtol=1e-5, atol=2e-6)
    assert not torch.allclose(scores(model.train(), batch), expected, atol=1e-2)


def test_positions_of_roberta_begin_behind_its_padding_id():
    assert [first_position(encoder(arch)) for arch in ENCODERS] == [0, 2, 0, 0, 0]
    assert [context_length(encoder(arch)) for arch in ENCODERS] == [CONTEXT] * len(ENCODERS)
    assert first_position(tiny_model("opt")) == 0


@pytest.mark.parametrize("arch", ENCODERS)
def test_a_row_of_the_whole_context_fits_and_is_the_longest_that_does(arch):
    model, tokenizer = encoder(arch), encoder_tokenizer(arch)
    ids = [tokenizer.cls_token_id] + [8] * (CONTEXT - 1)
    row = {"prefix_ids": [], "prefix_weights": [], "continuation_ids": [ids], "length": len(ids)}
    batch = collate([{**row, "continuation_weights": [[0.0] * len(ids)]}])
    with torch.no_grad():
        own = model(input_ids=torch.tensor([ids])).logits
    assert_close(scores(model, batch), own, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("arch", ENCODERS)
def test_the_head_is_all_that_is_beside_the_body_and_its_pooler(arch):
    assert set(encoder_head(encoder(arch))) == HEADS[arch]
    assert set(encoder_head(adapters.attach(encoder(arch), adapters.lora(2)))) == HEADS[arch]


def test_no_other_model_has_an_encoders_head():
    assert encoder_head(tiny_model()) == {}
    assert encoder_head(nn.Linear(2, 2)) == {}
    assert encoder_head(encoder().bert) == {}


@pytest.mark.parametrize("kind", [adapters.lora, adapters.ia3], ids=["lora", "ia3"])
@pytest.mark.parametrize("arch", ENCODERS)
def test_any_adapter_trains_and_saves_the_whole_head_and_no_weight_of_the_body(arch, kind):
    from peft import get_peft_model_state_dict

    model = adapters.attach(encoder(arch).requires_grad_(False), kind())
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    own = {name for name in trained if "modules_to_save" in name}
    heads = {name.split(".modules_to_save")[0].rsplit(".", 1)[-1] for name in own}
    assert heads == HEADS[arch]
    assert trained - own
    forward(model.train(), batch_of(arch), scores=True).scores_CK.sum().backward()
    assert all(model.get_parameter(name).grad is not None for name in own)
    saved = {part for name in get_peft_model_state_dict(model) for part in name.split(".")}
    assert saved >= HEADS[arch]


def test_a_fresh_adapter_leaves_the_scores_as_they_were():
    model, batch = encoder(), batch_of("bert")
    before = scores(model, batch)
    adapted = adapters.attach(model, adapters.lora(2))
    assert_close(scores(adapted, batch), before, rtol=1e-5, atol=2e-6)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    assert not torch.allclose(scores(adapted, batch), before, atol=1e-2)
    with adapted.disable_adapter():
        assert torch.equal(scores(adapted, batch), before)


def test_an_encoder_gives_scores_and_nothing_else():
    model, batch = encoder(), batch_of("bert")
    for asked, words in (
        ({}, "got log-probabilities"),
        ({"scores": True, "hidden": True}, "got hidden"),
        ({"scores": True, "temperature": 0.5}, "got temperature"),
        ({"scores": True, "path": "grouped"}, "path='grouped'"),
    ):
        with pytest.raises(CapabilityError, match=words):
            forward(model, batch, **asked)
    assert_close(forward(Scorer(model, path="padded"), batch, scores=True).scores_CK, scores(model, batch))


def test_an_encoder_is_no_policy_and_no_reward_model():
    from ftlib.models import as_reward_model
    from ftlib.models.plan import plan_for
    from ftlib.trainers import RewardTrainer, SFTTrainer
    from tests.trainers.tiny import VOCAB, rows

    with pytest.raises(CapabilityError, match="got the encoder BertForSequenceClassification"):
        plan_for(encoder())
    for make in (as_reward_model, lambda model: RewardTrainer(model, [])):
        with pytest.raises(CapabilityError, match="a head named 'score'"):
            make(encoder(labels=1))
    trainer = SFTTrainer(encoder(vocab_size=VOCAB).requires_grad_(True), rows(2))
    with pytest.raises(CapabilityError, match="got log-probabilities"):
        trainer.step(rows(2))


def test_the_padded_path_is_told_once(caplog):
    model, batch = encoder(), batch_of("bert")
    with caplog.at_level(logging.INFO, logger="ftlib"):
        scores(model, batch)
        scores(model, batch)
    told = [
        record for record in caplog.messages if "BertForSequenceClassification takes the padded" in record
    ]
    assert len(told) == 1


def test_a_model_whose_scores_depend_on_its_neighbours_is_refused():
    model = encoder()

    class Mixed(nn.Module):
        def forward(self, states):
            return states - states.mean(0, keepdim=True)

    model.dropout = Mixed()
    with pytest.raises(CapabilityError, match="expected scores of a row that padding leaves alone"):
        scores(model, batch_of("bert"))


@pytest.mark.parametrize("arch", ["bert", "modernbert"])
def test_checkpointing_changes_no_gradient(arch):
    from ftlib.models.checkpointing import enable_checkpointing

    model, batch = adapters.attach(encoder(arch), adapters.lora(2)).train(), batch_of(arch)

    def gradients():
        model.zero_grad()
        forward(model, batch, scores=True).scores_CK.square().sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    kept = gradients()
    enable_checkpointing(model)
    recomputed = gradients()
    assert kept.keys() == recomputed.keys()
    for name, value in kept.items():
        assert_close(recomputed[name], value, rtol=1e-5, atol=1e-5)
