"""ClassificationTrainer: what it minimises, reports and predicts, and what of it comes back."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from sklearn import metrics
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from ftlib import adapters
from ftlib.adapters.classes import classes_of
from ftlib.data import LabelledEncoder, Labels
from ftlib.engine import TrainConfig
from ftlib.errors import CapabilityError, CheckpointError, ConfigError, DataError
from ftlib.evaluation import class_report, classification_metrics, fit_temperature, probabilities
from ftlib.models import load
from ftlib.objectives import Classification
from ftlib.trainers import ClassificationTrainer
from tests.data.tokenizers_zoo import tiny
from tests.encoders import TEXTS, encoder, encoder_tokenizer, saved_encoder
from tests.models_zoo import tiny_model
from tests.trainers.tiny import At, trained, without_clock

NAMES = ["cat", "dog", "sky"]
CLASSES = [0, 1, 2, 2, 1, 2, 0, 2]
ROWS = [{"text": text, "label": NAMES[k]} for text, k in zip(TEXTS, CLASSES, strict=True)]
SETS = [{"text": row["text"], "label": [row["label"]] + ["wet"] * (i % 2)} for i, row in enumerate(ROWS)]
PAIRS = [
    {"text_a": a, "text_b": b, "label": str(len(a) > len(b))}
    for a, b in zip(TEXTS, TEXTS[1:] + TEXTS[:1], strict=True)
]
RELATIVE = 1e-5  # float32: sums taken in another order
GRADIENT = {  # one step of plain gradient descent: the weights move by the gradient
    "optimizer": lambda groups, rate: torch.optim.SGD(groups, 1.0),
    "max_grad_norm": 1e9,
    "schedule": "constant",
}
KINDS = ["encoder", "decoder"]
WAYS: dict[str, Any] = {
    "full": adapters.full,
    "lora": partial(adapters.lora, 4),
    "lora dropout": partial(adapters.lora, 4, dropout=0.2),
    "ia3": adapters.ia3,
}


def model_and_tokenizer(kind: str, labels: int = 3, arch: str = "bert") -> tuple[Any, Any]:
    if kind == "encoder":
        return encoder(arch, labels=labels), encoder_tokenizer(arch)
    tokenizer = tiny(pad="</s>")
    eos = tokenizer.eos_token_id
    return tiny_model(vocab_size=len(tokenizer), eos_token_id=eos, pad_token_id=eos), tokenizer


def made(
    kind: str = "encoder",
    way: Any = "lora",
    rows: Any = ROWS,
    eval_rows: Any = None,
    *,
    classes: int = 3,
    **options: Any,
) -> ClassificationTrainer:
    """A trainer that is the same at every call; an adapter has learnt something before."""
    torch.manual_seed(0)
    model, tokenizer = options.pop("model", None) or model_and_tokenizer(kind, classes)
    own = {name: options.pop(name) for name in list(options) if name not in TrainConfig.__dataclass_fields__}
    defaults = {"progress": "off", "learning_rate": 1e-3, "batch_size": 4, "log_steps": 1}
    trainer = ClassificationTrainer(
        model,
        rows,
        eval_rows,
        tokenizer=tokenizer,
        adapter=WAYS[way]() if isinstance(way, str) else way,
        config=TrainConfig(**(defaults | options)),
        **own,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in trainer.engine.masters.named.items():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return trainer


def classifier(*, adapter: Any = "lora", eval_data: Any = None, **options: Any) -> ClassificationTrainer:
    """`made` by the arguments that other trainers' makers take."""
    return made(way=adapter, eval_rows=eval_data, **options)


def moves(trainer: ClassificationTrainer, rows: Any) -> dict[str, Tensor]:
    """What one step does to the trained weights."""
    before = trained(trainer)  # type: ignore[arg-type]
    trainer.step(rows)
    return {name: value - before[name] for name, value in trained(trainer).items()}  # type: ignore[arg-type]


def assert_close_to_their_size(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    size = torch.stack([value.norm() for value in expected.values()]).norm()
    assert float(size) > 1e-3
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= RELATIVE * float(size), name


# -- what is minimised -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_probabilities_that_it_predicts(kind: str) -> None:
    trainer = made(kind)
    said = [row["probabilities"][k] for row, k in zip(trainer.predict(ROWS), CLASSES, strict=True)]
    expected = -sum(map(math.log, said)) / len(ROWS)
    assert trainer.evaluate(ROWS)["eval_loss"] == pytest.approx(expected, rel=RELATIVE)
    assert trainer.step(ROWS)["loss"] == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.parametrize(
    ("given", "weights"),
    [
        ((1.0, 2.0, 3.0), (1.0, 2.0, 3.0)),
        ({"sky": 3.0, "cat": 1.0, "dog": 2.0}, (1.0, 2.0, 3.0)),
        ("balanced", (8 / (3 * 2), 8 / (3 * 2), 8 / (3 * 4))),
    ],
    ids=["numbers", "names", "balanced"],
)
def test_class_weights_are_weighed_out_over_their_own_sum(given: Any, weights: Any) -> None:
    trainer = made(class_weights=given)
    losses = [
        -math.log(row["probabilities"][k]) for row, k in zip(trainer.predict(ROWS), CLASSES, strict=True)
    ]
    expected = sum(weights[k] * loss for k, loss in zip(CLASSES, losses, strict=True))
    expected /= sum(weights[k] for k in CLASSES)
    assert trainer.step(ROWS)["loss"] == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.parametrize("way", ["full", "lora", "ia3"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_cut_into_micro_batches_has_the_same_gradients(kind: str, way: str) -> None:
    rows = PAIRS if kind == "encoder" and way == "lora" else ROWS
    labels = 2 if rows is PAIRS else 3
    whole, cut, single = (
        made(kind, way, rows, classes=labels, max_tokens=tokens, class_weights="balanced", **GRADIENT)
        for tokens in (10_000, 60, 2)
    )
    expected = moves(whole, rows)
    assert_close_to_their_size(moves(cut, rows), expected)
    assert_close_to_their_size(moves(single, rows), expected)


@pytest.mark.parametrize("way", ["lora", "ia3"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_moves_every_trained_weight_and_no_bit_of_the_base(kind: str, way: str) -> None:
    trainer = made(kind, way, epochs=2)
    weights = dict(trainer.model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    trainer.train()
    for name, weight in weights.items():
        unread = name.endswith("key.bias")  # softmax does not see it
        assert torch.equal(weight, before[name]) is not weight.requires_grad or unread, name
    assert any("modules_to_save" in name for name, weight in weights.items() if weight.requires_grad)


def test_steps_by_hand_are_a_training_run() -> None:
    by_hand, whole = (made(epochs=2) for _ in range(2))
    rows = []
    while len(rows) < by_hand.steps:
        rows.append(by_hand.step([ROWS[index] for index in by_hand.sampler.next_batch()]))
    history = without_clock(whole.train().history)
    assert [row["loss"] for row in rows] == [row["loss"] for row in history]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["full", "lora", "ia3"])
@pytest.mark.parametrize("kind", KINDS)
def test_three_classes_are_memorised(kind: str, way: str) -> None:
    """Within the share of the starting loss that each way of training is good for."""
    rate = {"full": 3e-3, "lora": 1e-2, "ia3": 5e-2}[way] / (2 if kind == "encoder" and way != "full" else 1)
    options = {"batch_size": 8, "max_steps": 40, "learning_rate": rate, "schedule": "constant"}
    trainer = made(kind, way, ROWS, ROWS, **options)
    history = trainer.train().history
    assert history[-1]["loss"] <= {"full": 0.05, "lora": 0.05, "ia3": 0.25}[way] * history[0]["loss"]
    assert trainer.evaluate()["eval_accuracy"] == 1.0
    assert [row["label"] for row in trainer.predict(TEXTS)] == [row["label"] for row in ROWS]


SOFT = {
    "prompt": partial(adapters.prompt, 5),
    "p_tuning": partial(adapters.p_tuning, 5, encoder="mlp"),
    "prefix": partial(adapters.prefix, 5),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", SOFT)
def test_virtual_tokens_classify_and_come_back(way: str, kind: str, tmp_path: Path) -> None:
    """Pooled is the last token of a decoder's text, an encoder's own first, no pad and no virtual one."""
    options = {"batch_size": 8, "max_steps": 30, "learning_rate": 1e-2, "schedule": "constant"}
    trainer = made(kind, SOFT[way](), ROWS, ROWS, **options)
    alone = [trainer.predict([text])[0]["scores"] for text in TEXTS]
    assert np.allclose([row["scores"] for row in trainer.predict(TEXTS)], alone, rtol=RELATIVE, atol=1e-5)
    history = trainer.train().history
    assert history[-1]["loss"] <= 0.5 * history[0]["loss"]
    trainer.save(tmp_path)
    model, tokenizer = model_and_tokenizer(kind)
    again, _ = load(model, task="classification", adapter=tmp_path)
    more = ClassificationTrainer(again, ROWS, tokenizer=tokenizer)
    expected = [row["scores"] for row in trainer.predict(TEXTS)]
    assert np.allclose([row["scores"] for row in more.predict(TEXTS)], expected, rtol=1e-4, atol=1e-5)


# -- several classes per row -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_any_set_of_classes_is_memorised_and_predicted(kind: str) -> None:
    options = {"batch_size": 8, "max_steps": 40, "learning_rate": 5e-3, "schedule": "constant"}
    trainer = made(kind, "lora", SETS, SETS, classes=4, **options)
    assert trainer.labels == ("cat", "dog", "sky", "wet")
    assert trainer.model.config.problem_type == "multi_label_classification"
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_loss"] < 0.25 * before
    assert found["eval_accuracy"] == 1.0
    assert [row["label"] for row in trainer.predict(TEXTS)] == [sorted(row["label"]) for row in SETS]
    p = torch.tensor([row["probabilities"] for row in trainer.predict(TEXTS)])
    truth = torch.tensor([[float(name in row["label"]) for name in trainer.labels] for row in SETS])
    own = torch.nn.functional.binary_cross_entropy(p, truth.to(p))
    assert found["eval_loss"] == pytest.approx(float(own), rel=1e-4)


def test_one_zero_or_one_per_class_is_the_same_as_their_names() -> None:
    vectors = [
        {"text": row["text"], "label": [int(name in row["label"]) for name in (*NAMES, "wet")]}
        for row in SETS
    ]
    by_name, by_place = (
        made(rows=rows, classes=4, **GRADIENT, **more)
        for rows, more in ((SETS, {}), (vectors, {"labels": [*NAMES, "wet"]}))
    )  # fmt: skip
    assert_close_to_their_size(moves(by_place, vectors), moves(by_name, SETS))


# -- what is reported --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [ROWS, SETS], ids=["one class", "several"])
def test_an_evaluation_is_scikit_learns_on_what_is_predicted(rows: Any) -> None:
    trainer = made(rows=rows, classes=3 if rows is ROWS else 4, beta=2.0, epochs=4)
    trainer.train()
    said = trainer.predict(rows)
    names = list(trainer.labels)
    if rows is ROWS:
        truth = [names.index(row["label"]) for row in rows]
        predicted = [names.index(row["label"]) for row in said]
    else:
        truth = np.array([[int(name in row["label"]) for name in names] for row in rows])
        predicted = np.array([[int(name in row["label"]) for name in names] for row in said])
    found = trainer.evaluate(rows)
    macro: dict[str, Any] = {"average": "macro", "zero_division": 0}
    expected = {
        "eval_accuracy": metrics.accuracy_score(truth, predicted),
        "eval_f1_macro": metrics.f1_score(truth, predicted, **macro),
        "eval_f_beta_macro": metrics.fbeta_score(truth, predicted, beta=2.0, **macro),
        "eval_precision_macro": metrics.precision_score(truth, predicted, **macro),
        "eval_recall_micro": metrics.recall_score(truth, predicted, average="micro"),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    outcomes = trainer.outcomes(rows)
    numbers = classification_metrics(outcomes, beta=2.0)
    assert {name: found[f"eval_{name}"] for name in numbers} == pytest.approx(numbers, nan_ok=True)
    assert set(found) == {"eval_loss", *(f"eval_{name}" for name in numbers)}
    assert list(class_report(outcomes)) == names


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_reads_each_row_once(kind: str) -> None:
    trainer = made(kind, max_tokens=40)
    trainer.calibrate(ROWS)
    expected = classification_metrics(trainer.outcomes(ROWS))
    read: list[int] = []
    hook = trainer.engine.scorer.register_forward_hook(
        lambda _, given, __: read.append(given[0].continuations)
    )
    found = trainer.evaluate(ROWS)
    hook.remove()
    assert sum(read) == len(ROWS)
    assert len(read) > 1
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=RELATIVE)


def test_evaluations_of_a_run_can_choose_the_best() -> None:
    trainer = made(eval_rows=ROWS, epochs=3, eval_steps=2, metric_for_best="f1_macro", load_best=True)
    result = trainer.train()
    found = [row["eval_f1_macro"] for row in result.history if "eval_f1_macro" in row]
    assert result.metrics["best_metric"] == max(found)
    assert trainer.evaluate()["eval_f1_macro"] == pytest.approx(max(found))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_is_that_of_its_row_alone(kind: str) -> None:
    trainer = made(kind, eval_rows=ROWS)
    together = [row["scores"] for row in trainer.predict(ROWS)]
    alone = [trainer.predict([text])[0]["scores"] for text in TEXTS]
    assert np.allclose(together, alone, rtol=RELATIVE, atol=1e-5)
    assert [row["scores"] for row in trainer.predict(TEXTS)] == together
    first = trainer.predict(ROWS)[0]
    assert first["label"] == NAMES[int(np.argmax(first["probabilities"]))]
    assert sum(first["probabilities"]) == pytest.approx(1.0)


def test_a_fitted_temperature_enters_probabilities_alone_and_is_forgotten_in_training(tmp_path: Path) -> None:
    trainer = made(eval_rows=ROWS[::-1], epochs=2)
    trainer.train()
    before, loss = trainer.predict(TEXTS), trainer.evaluate()["eval_loss"]
    scores = np.array([row["scores"] for row in before])
    temperature = trainer.calibrate()
    assert temperature == pytest.approx(fit_temperature(scores, np.eye(3)[CLASSES]), rel=1e-6)
    after = trainer.predict(TEXTS)
    assert [row["scores"] for row in after] == [row["scores"] for row in before]
    assert [row["label"] for row in after] == [row["label"] for row in before]
    found = np.array([row["probabilities"] for row in after])
    assert np.allclose(found, probabilities(scores, temperature=temperature))
    assert trainer.evaluate()["eval_loss"] == loss
    trainer.save(tmp_path)
    assert json.loads((tmp_path / "classes.json").read_text())["temperature"] == temperature
    trainer.step(ROWS)
    assert classes_of(trainer.model).temperature == 1.0  # type: ignore[union-attr]


# -- what is saved -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["full", "lora", "ia3"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_scores_alike_in_plain_transformers(kind: str, way: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    if kind == "encoder":
        saved_encoder(base)
    else:
        model, tokenizer = model_and_tokenizer(kind)
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
    config = TrainConfig(epochs=2, learning_rate=1e-2, progress="off")
    language = load(base)[0].float() if kind == "decoder" else base
    trainer = ClassificationTrainer(language, ROWS, adapter=WAYS[way](), config=config)
    trainer.train()
    expected = np.array([row["scores"] for row in trainer.predict(TEXTS)])
    trainer.save(tmp_path / "saved")
    found = AutoTokenizer.from_pretrained(tmp_path / "saved")
    if way == "full":
        plain: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
        assert plain.config.id2label == dict(enumerate(NAMES))
    else:
        bare = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=3, pad_token_id=found.pad_token_id
        )
        plain = PeftModel.from_pretrained(bare, str(tmp_path / "saved"))
    with torch.no_grad():
        logits = plain.eval()(**found(TEXTS, padding=True, return_tensors="pt")).logits
    assert np.allclose(logits.numpy(), expected, rtol=1e-4, atol=1e-5)
    again = load(
        tmp_path / "saved" if way == "full" else base,
        task="classification",
        dtype="float32",
        adapter=None if way == "full" else tmp_path / "saved",
    )[0].requires_grad_(True)
    more = ClassificationTrainer(again, ROWS, tokenizer=found, config=config)
    assert more.labels == tuple(NAMES)
    assert np.allclose([row["scores"] for row in more.predict(TEXTS)], expected, rtol=1e-4, atol=1e-5)


def test_a_saved_model_works_in_transformers_own_pipeline(tmp_path: Path) -> None:
    trainer = made(way="full", epochs=2)
    trainer.train()
    trainer.save(tmp_path)
    said = pipeline("text-classification", model=str(tmp_path), device="cpu")(TEXTS, top_k=None)
    for theirs, mine in zip(said, trainer.predict(TEXTS), strict=True):
        shares = {each["label"]: each["score"] for each in theirs}
        assert [shares[name] for name in NAMES] == pytest.approx(mine["probabilities"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["full", "lora dropout"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind: str, way: str, tmp_path: Path) -> None:
    def run(folder: Path | None, callbacks: Any = (), resume: Any = None) -> Any:
        trainer = made(
            kind,
            way,
            ROWS,
            ROWS,
            epochs=3,
            eval_steps=2,
            output_dir=folder,
            max_tokens=40,
            callbacks=callbacks,
        )
        return trainer, trainer.train(resume=resume)

    whole, expected = run(None)
    stop = At("on_step_end", 3, lambda control: setattr(control, "should_training_stop", True))
    _, first = run(tmp_path, [stop])
    assert first.metrics["steps"] == 3
    again, found = run(tmp_path, resume=True)
    assert without_clock(found.history) == without_clock(expected.history)
    for name, value in trained(whole).items():
        assert torch.equal(trained(again)[name], value), name


def test_a_run_with_other_class_weights_is_another_run(tmp_path: Path) -> None:
    made(output_dir=tmp_path).train()
    with pytest.raises(CheckpointError, match="class_weights"):
        made(output_dir=tmp_path, class_weights="balanced").train(
            resume=sorted(tmp_path.glob("checkpoint*"))[0]
        )


# -- the classes -------------------------------------------------------------------------------------


def test_classes_of_a_model_that_knows_them_all_keep_their_order() -> None:
    first = made()
    rows = [row for row in ROWS if row["label"] != "cat"]
    again = ClassificationTrainer(first.model, rows, tokenizer=encoder_tokenizer())
    assert again.labels == tuple(NAMES)
    assert [row["label"] for row in again.train_data] == [[float(NAMES.index(row["label"]))] for row in rows]
    renamed = [{**row, "label": row["label"].upper()} for row in ROWS]
    assert ClassificationTrainer(first.model, renamed, tokenizer=encoder_tokenizer()).labels == (
        "CAT",
        "DOG",
        "SKY",
    )


def test_given_labels_decide_the_order_and_may_lack_rows() -> None:
    order = ["sky", "sea", "dog", "cat"]
    trainer = ClassificationTrainer(encoder(labels=4), ROWS, tokenizer=encoder_tokenizer(), labels=order)
    assert trainer.labels == tuple(order)
    assert trainer.train_data[0]["label"] == [3.0]
    assert trainer.model.config.id2label == dict(enumerate(order))


def test_an_unknown_label_of_the_evaluation_is_named_with_its_file_and_row(tmp_path: Path) -> None:
    path = tmp_path / "valid.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (ROWS[0], {"text": "sun", "label": "fish"})))
    with pytest.raises(DataError, match=rf"{path}:2:label: expected one of the classes .* got 'fish'"):
        made(eval_rows=path)
    with pytest.raises(DataError, match=rf"{path}:2:label"):
        made().evaluate(path)


def test_encoded_rows_are_taken_and_their_labels_checked() -> None:
    encoded = LabelledEncoder(encoder_tokenizer())(ROWS)
    trainer = made(rows=encoded, **GRADIENT)
    assert trainer.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert_close_to_their_size(moves(trainer, list(encoded)), moves(made(**GRADIENT), ROWS))
    with pytest.raises(DataError, match=r"label numbers below 3, got \[7\]"):
        trainer.evaluate([{**encoded[0], "label": [7.0]}])


def test_an_encoder_of_the_callers_cuts_long_rows() -> None:
    tokenizer = encoder_tokenizer()
    long = [{"text": " ".join(["sun"] * 60), "label": "sky"}]
    with pytest.raises(
        DataError, match=r"within the model's context of 40 tokens, got <list>:9 \(62 tokens\)"
    ):
        made(rows=ROWS + long)
    cutting = LabelledEncoder(tokenizer, max_length=20, overflow="truncate")
    trainer = made(rows=ROWS + long, encoder=cutting)
    assert max(trainer.train_data["length"]) == 20
    assert trainer.predict(long)[0]["label"] in NAMES
    assert cutting.report.truncated == 1


def test_the_head_of_a_name_has_as_many_outputs_as_there_are_classes(tmp_path: Path) -> None:
    saved_encoder(tmp_path)
    trainer = ClassificationTrainer(tmp_path, PAIRS, adapter=adapters.lora(2))
    assert trainer.labels == ("False", "True")
    assert trainer.model.config.num_labels == 2
    assert trainer.predict([{"text_a": "sun", "text_b": "snow"}])[0]["label"] in ("False", "True")


# -- what is refused ---------------------------------------------------------------------------------


def test_a_classifier_writes_no_text() -> None:
    with pytest.raises(CapabilityError, match=r"generate: .*got a classifier\. Use predict\(\)"):
        made().generate(["yes?"])


def test_rows_without_a_label_can_be_predicted_not_learned() -> None:
    plain = [{"text": text} for text in TEXTS]
    for rows in (plain, TEXTS):
        with pytest.raises(DataError, match="expected a column label"):
            made(rows=rows)
        with pytest.raises(DataError, match="evaluate: expected rows with a label"):
            made().evaluate(rows)
    assert len(made().predict(plain)) == len(TEXTS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"class_weights": "even"}, '"balanced" or numbers'),
        ({"class_weights": (1.0,)}, "a class weight for each"),
        ({"class_weights": {"cat": 1.0}}, "expected class_weights of"),
        ({"class_weights": (1.0, -1.0, 1.0)}, "class_weights: expected a list of finite numbers > 0"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected a number >= 0 and < 1"),
        ({"beta": 0.0}, "beta > 0"),
        ({"objective": Classification(), "class_weights": "balanced"}, "class_weights has no effect beside"),
    ],
)
def test_options_out_of_range_or_without_effect_are_refused(options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        made(**options)


def test_labels_beside_an_encoder_of_others_and_classes_that_do_not_fit_are_refused() -> None:
    tokenizer = encoder_tokenizer()
    other = LabelledEncoder(tokenizer, labels=Labels(("a", "b", "c")))
    with pytest.raises(ConfigError, match="labels differ from those of the encoder"):
        ClassificationTrainer(encoder(), ROWS, tokenizer=tokenizer, encoder=other, labels=NAMES)
    with pytest.raises(ConfigError, match="expected a classifier of 3 classes, got one of 5"):
        ClassificationTrainer(encoder(labels=5), ROWS, tokenizer=tokenizer)
    with pytest.raises(CapabilityError, match=r"ftlib\.adapters\.merge"):
        ClassificationTrainer(adapters.attach(tiny_model(), adapters.lora(2)), ROWS, tokenizer=tokenizer)


def test_classes_without_a_row_cannot_be_balanced() -> None:
    with pytest.raises(ConfigError, match=r"got none of 'sea'"):
        ClassificationTrainer(
            encoder(labels=4),
            ROWS,
            tokenizer=encoder_tokenizer(),
            labels=[*NAMES, "sea"],
            class_weights="balanced",
        )


def test_smoothed_labels_reach_the_loss() -> None:
    trainer = made(label_smoothing=0.3)
    logs = np.log([row["probabilities"] for row in trainer.predict(ROWS)])
    expected = -np.mean(0.7 * logs[range(8), CLASSES] + 0.3 * logs.mean(-1))
    assert trainer.step(ROWS)["loss"] == pytest.approx(float(expected), rel=RELATIVE)


def test_transformers_own_loss_is_the_trainers() -> None:
    trainer = made()
    batch = encoder_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = trainer.model.eval()(**batch, labels=torch.tensor(CLASSES)).loss
    assert_close(torch.tensor(trainer.evaluate(ROWS)["eval_loss"]), theirs, rtol=RELATIVE, atol=1e-6)
