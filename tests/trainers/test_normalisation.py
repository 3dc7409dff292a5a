"""Scores on a scale of their own: fitted, applied, saved with the weights, and forgotten with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import ftlib as ft
from ftlib.adapters import attach, full, lora, merge
from ftlib.adapters.normalisation import SIDECAR, Normalisation, normalisation_of, set_normalisation
from ftlib.errors import ConfigError, DataError
from ftlib.models import as_reward_model
from ftlib.rollouts.rewards import reward_model
from ftlib.trainers import RewardTrainer
from tests.data.tokenizers_zoo import tiny as tiny_tokenizer
from tests.models_zoo import tiny_model
from tests.trainers.preferences import preference_trainer
from tests.trainers.tiny import without_clock

RECORDS = [
    {"prompt": f"Question {index}: What does it do?", "chosen": " yes" * (index + 1), "rejected": " no."}
    for index in range(6)
]
PROMPTS, ANSWERS = [row["prompt"] for row in RECORDS], [row["chosen"] for row in RECORDS]
OTHERS = [row["rejected"] for row in RECORDS]
TOKENIZER = tiny_tokenizer(pad="</s>")


def made(adapter: Any = "lora", **options: Any) -> Any:
    model = options.pop("model", None) or tiny_model(vocab_size=len(TOKENIZER))
    return preference_trainer(
        RewardTrainer, adapter=adapter, model=model, data=RECORDS, tokenizer=TOKENIZER, **options
    )


def fitted(adapter: Any = "lora", **options: Any) -> Any:
    trainer = made(adapter, **options)
    trainer.train()
    trainer.fit_normalisation(PROMPTS, ANSWERS)
    return trainer


def loaded(base: Path, adapter: Path | None = None) -> Any:
    """A trainer around what was saved, to ask for scores."""
    model, _ = ft.load(base, task="reward", adapter=adapter, dtype="float32")
    return made(None, model=model.requires_grad_(True))


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_completions_of_reference_score_mean_0_and_deviation_1(adapter: str) -> None:
    trainer = made(adapter)
    trainer.train()
    before = trainer.score(PROMPTS, OTHERS)
    raw = np.asarray(trainer.score(PROMPTS, ANSWERS))
    trainer.fit_normalisation(PROMPTS, ANSWERS)
    scores = trainer.score(PROMPTS, ANSWERS)
    assert (np.mean(scores), np.std(scores)) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))
    expected = (np.asarray(before) - raw.mean()) / raw.std()
    assert trainer.score(PROMPTS, OTHERS) == pytest.approx(expected.tolist()), (
        "any other by the same two numbers"
    )


def test_losses_evaluations_and_predictions_are_of_the_heads_own_scores() -> None:
    trainer = made(eval_data=RECORDS)
    before = trainer.evaluate(), trainer.predict(RECORDS), trainer.answers(RECORDS)
    trainer.fit_normalisation(PROMPTS, ANSWERS)
    assert (trainer.evaluate(), trainer.predict(RECORDS), trainer.answers(RECORDS)) == before


def test_fitted_again_it_is_the_same() -> None:
    """On the head's own scores, not on the normalised ones."""
    trainer = fitted()
    first = normalisation_of(trainer.model)
    trainer.fit_normalisation(PROMPTS, ANSWERS)
    assert normalisation_of(trainer.model) == first


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_it_is_saved_with_the_weights(adapter: str, tmp_path: Path) -> None:
    trainer = fitted(adapter)
    expected = trainer.score(PROMPTS, OTHERS)
    trainer.save(tmp_path / "saved")
    if adapter == "lora":
        assert set(json.loads((tmp_path / "saved" / SIDECAR).read_text())) == {"mean", "std"}
        tiny_model(vocab_size=len(TOKENIZER)).save_pretrained(tmp_path / "base")
        TOKENIZER.save_pretrained(tmp_path / "base")
        again = loaded(tmp_path / "base", tmp_path / "saved")
    else:
        assert set(json.loads((tmp_path / "saved" / "config.json").read_text())["score_normalisation"]) == {
            "mean",
            "std",
        }
        assert not (tmp_path / "saved" / SIDECAR).exists()
        again = loaded(tmp_path / "saved")
    assert again.score(PROMPTS, OTHERS) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_others_load_what_is_saved_and_see_the_heads_own_scores(adapter: str, tmp_path: Path) -> None:
    trainer = fitted(adapter)
    expected = [row["scores"][0] for row in trainer.predict(RECORDS)]
    trainer.save(tmp_path / "saved")
    source = tmp_path / "saved"
    if adapter == "lora":
        source = tmp_path / "base"
        tiny_model(vocab_size=len(TOKENIZER)).save_pretrained(source)
    plain = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, pad_token_id=0)
    if adapter == "lora":
        plain = PeftModel.from_pretrained(plain, str(tmp_path / "saved"))
    assert [row["scores"][0] for row in made(None, model=plain.requires_grad_(True)).predict(RECORDS)] == (
        pytest.approx(expected, rel=1e-4, abs=1e-5)
    )


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_as_a_reward_function_the_model_gives_its_scores_on_that_scale(adapter: str) -> None:
    trainer = fitted(adapter)
    found = reward_model(trainer.model, TOKENIZER)(PROMPTS, OTHERS)
    assert found == pytest.approx(trainer.score(PROMPTS, OTHERS), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("goes_on", ["step", "train", "resume"])
def test_training_on_forgets_it(goes_on: str, tmp_path: Path) -> None:
    trainer = fitted(epochs=1, output_dir=tmp_path)
    assert normalisation_of(trainer.model) is not None
    if goes_on == "step":
        trainer.step(RECORDS)
    else:
        trainer.train(resume=goes_on == "resume")
    assert normalisation_of(trainer.model) is None
    raw = [row["scores"][0] for row in trainer.predict(RECORDS)]
    assert trainer.score(PROMPTS, ANSWERS) == pytest.approx(raw, rel=1e-5)


def test_a_run_is_the_same_with_it_and_without() -> None:
    trainer = made()
    trainer.fit_normalisation(PROMPTS, ANSWERS)
    assert without_clock(trainer.train().history) == without_clock(made().train().history)


def test_an_adapter_saved_over_another_does_not_take_its_scale(tmp_path: Path) -> None:
    fitted().save(tmp_path)
    assert (tmp_path / SIDECAR).exists()
    made().save(tmp_path)
    assert not (tmp_path / SIDECAR).exists()


def test_each_adapter_has_its_own_and_a_new_one_none() -> None:
    model = attach(as_reward_model(tiny_model()), full())
    set_normalisation(model, Normalisation(1.0, 2.0))
    model = attach(model, lora(2), name="first")
    assert normalisation_of(model) is None
    set_normalisation(model, Normalisation(3.0, 4.0))
    attach(model, lora(2), name="second")
    assert normalisation_of(model) is None
    model.set_adapter("first")
    assert normalisation_of(model) == Normalisation(3.0, 4.0)


@pytest.mark.parametrize("scale", [Normalisation(3.0, 4.0), None])
def test_a_merged_model_has_that_of_its_adapter(scale: Normalisation | None) -> None:
    base = as_reward_model(tiny_model())
    set_normalisation(base, Normalisation(1.0, 2.0))
    model = attach(base, lora(2))
    set_normalisation(model, scale)
    assert normalisation_of(merge(model)) == scale


def test_completions_that_all_score_the_same_have_no_scale() -> None:
    with pytest.raises(DataError, match=r"scores differ, got 2 that all score .* Give more of them"):
        made().fit_normalisation(PROMPTS[:1] * 2, ANSWERS[:1] * 2)


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[1, 2]",
        '{"mean": 0.0, "std": 0.0}',
        '{"mean": 0.0, "std": NaN}',
        '{"mean": "a", "std": 1}',
        "{",
    ],
)
def test_a_file_that_says_something_else_is_named_and_refused(content: str, tmp_path: Path) -> None:
    fitted().save(tmp_path / "saved")
    (tmp_path / "saved" / SIDECAR).write_text(content)
    with pytest.raises(ConfigError, match=SIDECAR):
        attach(as_reward_model(tiny_model(vocab_size=len(TOKENIZER))), tmp_path / "saved")
