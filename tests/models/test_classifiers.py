"""task="classification" and "masked_lm": which head a model gets, and that it is the one that comes back."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from ftlib import adapters
from ftlib.adapters.classes import CLASSES, Classes, classes_of, set_classes
from ftlib.data import LabelledEncoder
from ftlib.data.collate import collate
from ftlib.errors import CapabilityError, CheckpointError, ConfigError
from ftlib.export import CardData, save
from ftlib.models import as_reward_model, forward, load
from ftlib.models.classifiers import as_classifier
from tests.data.tokenizers_zoo import tiny
from tests.encoders import ENCODERS, TEXTS, encoder, encoder_tokenizer, saved_encoder
from tests.models_zoo import tiny_model

CARD = CardData(
    title="t",
    trainer="Classification",
    data_rows=1,
    data_fingerprint="f",
    samples=(),
    show_samples=False,
    trained_share=1.0,
    template_hash=None,
    hyperparameters={},
    metrics={},
)
NAMES = Classes(("low", "mid", "high"))


def scores(model: Any, tokenizer: Any) -> torch.Tensor:
    data = LabelledEncoder(tokenizer)(TEXTS)
    with torch.no_grad():
        return forward(model.eval(), collate([data[i] for i in range(len(data))]), scores=True).scores_CK


def plain_scores(model: Any, tokenizer: Any, side: str | None = None) -> torch.Tensor:
    """Transformers' or peft's own, one row at a time or padded on one side."""
    model.eval()
    with torch.no_grad():
        if side is not None:
            return model(**tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")).logits
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS])


def moved(model: Any) -> Any:
    """With trained weights that are no longer what they started from."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


@pytest.fixture
def decoder(tmp_path: Any) -> Any:
    """A saved language model whose tokenizer pads with its end of sequence."""
    tokenizer = tiny(pad="</s>")
    eos = tokenizer.eos_token_id
    tiny_model(vocab_size=len(tokenizer), eos_token_id=eos, pad_token_id=eos).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


# --- a new head ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModel], ids=["masked", "body"])
@pytest.mark.parametrize("arch", ENCODERS)
def test_a_pretrained_encoder_gets_a_new_head_on_its_own_body(arch: str, auto: Any, tmp_path: Any) -> None:
    saved_encoder(tmp_path, arch, auto=auto)
    model, tokenizer = load(tmp_path, task="classification", num_labels=3)
    assert type(model) is type(encoder(arch))
    body, expected = model.base_model.state_dict(), auto.from_pretrained(tmp_path).base_model.state_dict()
    for name in expected.keys() & body.keys():
        assert torch.equal(body[name], expected[name]), name
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert scores(model, tokenizer).shape == (len(TEXTS), 3)
    assert classes_of(model) == Classes(("LABEL_0", "LABEL_1", "LABEL_2"))


def test_a_seed_fixes_the_new_head(tmp_path: Any) -> None:
    saved_encoder(tmp_path)

    def head(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model: Any = load(tmp_path, task="classification", num_labels=3)[0]
        return torch.cat([model.classifier.weight.flatten(), model.bert.pooler.dense.weight.flatten()])

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


@pytest.mark.parametrize("adapter", [None, "lora"])
def test_a_language_model_gets_a_score_head_of_that_many_outputs(decoder: Any, adapter: str | None) -> None:
    made = adapters.lora(2) if adapter else None
    model, tokenizer = load(decoder, task="classification", num_labels=3, adapter=made, dtype="float32")
    own: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    assert type(own).__name__ == "LlamaForSequenceClassification"
    assert own.score.weight.shape == (3, 32)
    assert tokenizer.pad_token_id == own.config.pad_token_id != tokenizer.eos_token_id
    assert_close(scores(model, tokenizer), plain_scores(model, tokenizer), rtol=1e-5, atol=1e-5)
    for side in ("left", "right"):
        assert_close(plain_scores(model, tokenizer, side), scores(model, tokenizer), rtol=1e-5, atol=1e-5)


def test_a_loaded_language_model_shares_its_body(decoder: Any) -> None:
    language, _ = load(decoder)
    model, _ = load(language, task="classification", num_labels=4)
    assert model.base_model is language.base_model  # type: ignore[union-attr]
    assert as_classifier(model, 4) is model


def test_a_masked_language_model_is_loaded_whole_or_not_at_all(tmp_path: Any) -> None:
    saved_encoder(tmp_path / "masked")
    saved_encoder(tmp_path / "body", auto=AutoModel)
    model, _ = load(tmp_path / "masked", task="masked_lm")
    expected = AutoModelForMaskedLM.from_pretrained(tmp_path / "masked")
    assert type(model) is type(expected)
    for name, weight in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    with pytest.raises(CheckpointError, match=r"missing .*cls\.predictions"):
        load(tmp_path / "body", task="masked_lm")


# --- a head that is there -------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ENCODERS)
def test_a_saved_classifier_comes_back_in_plain_transformers_and_here(arch: str, tmp_path: Any) -> None:
    model, tokenizer = encoder(arch), encoder_tokenizer(arch)
    set_classes(model, Classes(NAMES.names, temperature=1.5))
    save(tmp_path, model, tokenizer, card=CARD)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert plain.config.id2label == {0: "low", 1: "mid", 2: "high"}
    assert plain.config.label2id == {"low": 0, "mid": 1, "high": 2}
    assert_close(plain_scores(plain, found), scores(model, tokenizer), rtol=1e-5, atol=2e-6)
    again, _ = load(tmp_path, task="classification")
    assert_close(scores(again, found), scores(model, tokenizer), rtol=1e-5, atol=2e-6)
    assert classes_of(again) == Classes(NAMES.names, temperature=1.5)


@pytest.mark.parametrize("arch", ENCODERS)
def test_a_saved_adapter_comes_back_on_any_draw_of_its_base(arch: str, tmp_path: Any) -> None:
    """The head, pooler and all: the base gets another one, drawn anew."""
    saved_encoder(tmp_path / "base", arch)
    torch.manual_seed(1)
    model, tokenizer = load(tmp_path / "base", task="classification", num_labels=3, adapter=adapters.lora(2))
    set_classes(moved(model), NAMES)
    expected = scores(model, tokenizer)
    save(tmp_path / "adapter", model, tokenizer, card=CARD)
    torch.manual_seed(2)
    again, _ = load(tmp_path / "base", task="classification", adapter=tmp_path / "adapter")
    assert_close(scores(again, tokenizer), expected, rtol=0, atol=1e-6)
    assert classes_of(again) == NAMES
    assert {name for name, weight in again.named_parameters() if weight.requires_grad} == {
        name for name, weight in model.named_parameters() if weight.requires_grad
    }
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert_close(plain_scores(plain, tokenizer), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_saved_decoder_classifier_scores_alike_in_plain_peft_on_either_side(
    decoder: Any, side: str, tmp_path: Any
) -> None:
    model, tokenizer = load(
        decoder, task="classification", num_labels=3, adapter=adapters.lora(2), dtype="float32"
    )
    expected = scores(moved(model), tokenizer)
    save(tmp_path / "adapter", model, tokenizer, card=CARD)
    found = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    base = AutoModelForSequenceClassification.from_pretrained(
        decoder, num_labels=3, pad_token_id=found.pad_token_id
    )
    plain = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert_close(plain_scores(plain, found, side), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["bert", "modernbert"])
def test_a_merged_classifier_is_plain_and_scores_alike(arch: str) -> None:
    tokenizer, model = encoder_tokenizer(arch), adapters.attach(encoder(arch), adapters.lora(2))
    expected = scores(moved(model), tokenizer)
    merged = adapters.merge(model)
    assert type(merged) is type(encoder(arch))
    assert_close(scores(merged, tokenizer), expected, rtol=1e-5, atol=1e-5)
    assert_close(plain_scores(merged, tokenizer), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_another_number_of_classes_is_another_head_and_is_told(
    kind: str, decoder: Any, tmp_path: Any, caplog: Any
) -> None:
    if kind == "encoder":
        encoder().save_pretrained(tmp_path / "three")
        encoder_tokenizer().save_pretrained(tmp_path / "three")
    else:
        model, tokenizer = load(decoder, task="classification", num_labels=3)
        save(tmp_path / "three", model, tokenizer, card=CARD)
    body = load_file(tmp_path / "three" / "model.safetensors")
    with caplog.at_level(logging.WARNING, logger="ftlib"):
        model, _ = load(tmp_path / "three", task="classification", num_labels=5)
    assert model.config.num_labels == 5
    head = "classifier.weight" if kind == "encoder" else "score.weight"
    assert model.state_dict()[head].shape[0] == 5
    assert float(model.state_dict()[head].std()) > 0
    assert any(head in message for message in caplog.messages)
    for name, weight in body.items():
        if not name.startswith(("classifier", "score")):
            assert torch.equal(model.state_dict()[name], weight), name


# --- what is refused ------------------------------------------------------------------------------------


def test_the_number_of_classes_must_be_known(decoder: Any, tmp_path: Any) -> None:
    saved_encoder(tmp_path / "encoder")
    for place in (decoder, tmp_path / "encoder"):
        with pytest.raises(ConfigError, match="expected num_labels, the number of classes"):
            load(place, task="classification")
    with pytest.raises(ConfigError, match="num_labels=3 has no effect on task='causal_lm'"):
        load(decoder, num_labels=3)


def test_weights_of_the_body_are_never_random(tmp_path: Any) -> None:
    saved_encoder(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("bert.encoder.layer.1.output.dense.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing 1: bert\.encoder\.layer\.1\.output\.dense\.weight"):
        load(tmp_path, task="classification", num_labels=3)


def test_a_body_of_another_size_is_never_random(decoder: Any, tmp_path: Any) -> None:
    model, tokenizer = load(decoder, task="classification", num_labels=3)
    save(tmp_path / "three", model, tokenizer, card=CARD)
    weights = load_file(tmp_path / "three" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(
        weights | {name: weights[name][:-1].clone()},
        tmp_path / "three" / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"missing 1: model\.layers\.0\.mlp\.up_proj\.weight"):
        load(tmp_path / "three", task="classification")


def test_adapters_of_another_kind_are_refused(tmp_path: Any) -> None:
    saved_encoder(tmp_path / "base")
    masked, tokenizer = load(tmp_path / "base", task="masked_lm", adapter=adapters.lora(2))
    save(tmp_path / "masked", masked, tokenizer, card=CARD)
    with pytest.raises(CapabilityError, match="expected an adapter saved with its score head, found none"):
        load(tmp_path / "base", task="classification", num_labels=3, adapter=tmp_path / "masked")
    with pytest.raises(CapabilityError, match=r"expected a plain language model.*ftlib\.adapters\.merge"):
        as_classifier(adapters.attach(tiny_model(), adapters.lora(2)), 3)
    with pytest.raises(ConfigError, match="expected a classifier of 4 classes, got one of 3"):
        as_classifier(encoder(), 4)
    with pytest.raises(ConfigError, match=r"got a classifier of 3 labels"):
        as_reward_model(as_classifier(tiny_model(), 3))


def test_a_file_of_classes_that_holds_something_else_is_refused(tmp_path: Any) -> None:
    saved_encoder(tmp_path / "base")
    model, tokenizer = load(tmp_path / "base", task="classification", num_labels=3, adapter=adapters.lora(2))
    save(tmp_path / "adapter", model, tokenizer, card=CARD)
    for text in ("{}", '{"names": [1], "several": false, "temperature": 1}', '{"names": [], "several": 0}'):
        (tmp_path / "adapter" / CLASSES).write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=r"classes\.json: expected"):
            load(tmp_path / "base", task="classification", adapter=tmp_path / "adapter")


def test_a_folder_that_is_saved_to_again_forgets_the_classes_that_were_there(tmp_path: Any) -> None:
    classifier = adapters.attach(encoder(), adapters.lora(2))
    set_classes(classifier, NAMES)
    save(tmp_path, classifier, None, card=CARD)
    assert (tmp_path / CLASSES).is_file()
    save(tmp_path, adapters.attach(tiny_model(), adapters.lora(2)), None, card=CARD)
    assert not (tmp_path / CLASSES).exists()
