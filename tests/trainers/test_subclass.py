"""What a trainer of another kind has to say, and that nothing else is needed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ftlib.adapters import lora
from ftlib.batches import LossOutput, Mean
from ftlib.data import Encoder
from ftlib.engine import TrainConfig
from ftlib.errors import CapabilityError, ConfigError
from ftlib.objectives import SFT
from ftlib.trainers import Trainer
from tests.data.tokenizers_zoo import tiny as tiny_tokenizer
from tests.models_zoo import tiny_model
from tests.trainers.tiny import rows

DATA = rows(4)
RECORDS = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(3)]
OFF = TrainConfig(progress="off", batch_size=4)


class TwoTerms:
    """The loss of SFT twice, under two names, and a metric: the groups of the batch."""

    def counts(self, batch):
        [count] = SFT().counts(batch).values()
        return {"first": count, "second": count}

    def __call__(self, model, batch):
        [mean] = SFT()(model, batch).terms.values()
        one = torch.ones(())
        return LossOutput({"first": mean, "second": mean}, {"groups": Mean(len(batch.spans) * one, one)})


class Plain(Trainer):
    """Only what must be said."""

    def default_objective(self):
        return TwoTerms()


class Scores(Plain):
    """Everything a subclass may say."""

    no_generation = "expected a model that writes text, got one that scores. Use predict."
    prepared: list[nn.Module]

    def prepare_model(self, model, tokenizer):
        self.prepared = [model]
        assert not hasattr(self, "train_data"), "the model comes first"
        assert not any("lora" in name for name, _ in model.named_parameters()), "and before the adapter"
        return tiny_model("llama", vocab_size=model.config.vocab_size, seed=7)

    def default_encoder(self, tokenizer):
        return Encoder(tokenizer, prompt_loss_weight=0.5)

    def evaluation(self, output):
        return {"accuracy": float(output.metrics["groups"].value)}

    def predictions(self, data):
        assert not torch.is_grad_enabled()
        assert not self.model.training
        return [{"tokens": example["length"]} for example in data]


def test_without_an_objective_there_is_no_trainer():
    with pytest.raises(NotImplementedError, match=r"ftlib\.SFTTrainer"):
        Trainer(tiny_model("llama"), DATA, adapter=lora(4), config=OFF)


def test_an_evaluation_reports_loss_terms_and_metrics_and_no_perplexity():
    metrics = Plain(tiny_model("llama"), DATA, DATA, adapter=lora(4), config=OFF).evaluate()
    assert list(metrics) == ["eval_loss", "eval_loss_first", "eval_loss_second", "eval_groups"]
    assert metrics["eval_loss"] == metrics["eval_loss_first"] + metrics["eval_loss_second"] > 0
    assert metrics["eval_groups"] == len(DATA)


def test_a_subclass_reports_and_predicts_in_its_own_words():
    trainer = Scores(tiny_model("llama"), DATA, DATA, adapter=lora(4), config=OFF)
    assert trainer.evaluate() == {"eval_accuracy": len(DATA)}
    trainer.model.train()
    assert trainer.predict(DATA) == [{"tokens": row["length"]} for row in DATA]
    assert trainer.model.training, "the mode is put back"


def test_a_subclass_makes_the_model_it_trains_and_the_encoding_of_its_records():
    tokenizer = tiny_tokenizer()
    given = tiny_model("llama", vocab_size=len(tokenizer))
    trainer = Scores(given, RECORDS, tokenizer=tokenizer, adapter=lora(4), config=OFF)
    assert trainer.prepared == [given]
    expected = tiny_model("llama", vocab_size=len(tokenizer), seed=7)
    inner = trainer.model.get_base_model().model.embed_tokens.weight
    assert torch.equal(inner, expected.model.embed_tokens.weight)
    assert {weight for row in trainer.train_data for weight in row["prefix_weights"]} == {0.5}


def test_the_kind_of_model_goes_to_load():
    class OfAnotherTask(Plain):
        task = "stand_in"

    with pytest.raises(ConfigError, match="'stand_in'"):
        OfAnotherTask("any name", DATA, config=OFF)


def test_generation_is_refused_with_the_reason():
    trainer = Scores(tiny_model("llama"), DATA, adapter=lora(4), config=OFF)
    with pytest.raises(CapabilityError, match=r"^generate: .*one that scores\. Use predict\.$"):
        trainer.generate(["yes"])
