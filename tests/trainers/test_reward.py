"""RewardTrainer: what it minimises and reports, the head that it trains, and what is saved of it."""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import ftlib as ft
from ftlib.adapters import attach, full, lora, merge
from ftlib.data import Encoder, formatters
from ftlib.errors import CapabilityError, ConfigError, DataError
from ftlib.evaluation import pair_metrics, plots
from ftlib.models import Scored
from ftlib.objectives import Reward
from ftlib.trainers import RewardTrainer
from tests.data.tokenizers_zoo import tiny as tiny_tokenizer
from tests.models_zoo import tiny_model
from tests.trainers.preferences import PAIRS, UNSEEN, moved, pairs, preference_trainer
from tests.trainers.tiny import trained, without_clock

RELATIVE = 1e-5  # float32: sums taken in another order
reward = partial(preference_trainer, RewardTrainer)
GRADIENT = {  # one step of plain gradient descent: the weights move by the gradient
    "optimizer": lambda groups, rate: torch.optim.SGD(groups, 1.0),
    "max_grad_norm": 1e9,
    "schedule": "constant",
}
RECORDS = [
    {"prompt": f"Question {index}: What does it do?", "chosen": " yes" * (index + 1), "rejected": " no."}
    for index in range(6)
]
PROMPTS, ANSWERS = [row["prompt"] for row in RECORDS], [row["chosen"] for row in RECORDS]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One that pads with its end of sequence."""
    return tiny_tokenizer(pad="</s>")


def from_records(tokenizer: Any, adapter: Any = "lora", data: Any = RECORDS, **options: Any) -> Any:
    """A trainer of a model that pads with EOS, as its tokenizer does."""
    eos = tokenizer.eos_token_id
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=eos, pad_token_id=eos)
    return reward(adapter=adapter, model=model, data=data, tokenizer=tokenizer, **options)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def head(trainer: Any) -> Tensor:
    [weight] = [value for name, value in trainer.engine.masters.named.items() if "score" in name]
    return weight.detach().clone()


def moves(trainer: Any, data: Any) -> dict[str, Tensor]:
    """What one step does to the trained weights."""
    before = trained(trainer)
    trainer.step(data)
    return {name: value - before[name] for name, value in trained(trainer).items()}


def assert_close_to_their_size(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    size = torch.stack([value.norm() for value in expected.values()]).norm()
    assert float(size) > 1e-3
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= RELATIVE * float(size), name


# -- what is minimised -------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [0.0, 0.1])
def test_the_loss_is_that_of_the_scores_that_it_predicts(center: float) -> None:
    trainer = reward(center=center)
    scores = [row["scores"] for row in trainer.predict(PAIRS)]
    losses = [math.log1p(math.exp(-(w - r))) + center * (w + r) ** 2 for w, r in scores]
    assert trainer.step(PAIRS)["loss"] == pytest.approx(sum(losses) / len(losses), rel=RELATIVE)


def test_a_margin_in_the_data_is_asked_for() -> None:
    rows = [{**row, "margin": [0.5, 0.0]} for row in PAIRS]
    trainer = reward(data=rows)
    leads = [w - r for w, r in (row["scores"] for row in trainer.predict(rows))]
    expected = sum(math.log1p(math.exp(0.5 - lead)) for lead in leads) / len(leads)
    assert trainer.step(rows)["loss"] == pytest.approx(expected, rel=RELATIVE)


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("max_tokens", [25, 60, 1000], ids=["single pairs", "several", "one micro-batch"])
def test_any_cut_into_micro_batches_has_the_same_gradients(adapter: str, max_tokens: int) -> None:
    """R5."""
    options = {"adapter": adapter, "center": 0.01, **GRADIENT}
    whole, cut = reward(max_tokens=10_000, **options), reward(max_tokens=max_tokens, **options)
    assert_close_to_their_size(moves(cut, PAIRS), moves(whole, PAIRS))


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_ranked_answers_are_all_their_pairs(adapter: str) -> None:
    """Six pairs of four answers, each weighing a sixth: the group counts as one."""
    ranked = pairs(2, answers=4)
    as_pairs = [
        {
            **row,
            "continuation_ids": [row["continuation_ids"][i] for i in two],
            "continuation_weights": [row["continuation_weights"][i] for i in two],
            "length": len(row["prefix_ids"]) + sum(len(row["continuation_ids"][i]) for i in two),
        }
        for row in ranked
        for two in combinations(range(4), 2)
    ]
    assert len(as_pairs) == 12
    ours, theirs = (
        reward(adapter=adapter, data=ranked, **GRADIENT),
        reward(adapter=adapter, data=as_pairs, **GRADIENT),
    )
    assert ours.evaluate(ranked)["eval_loss"] == pytest.approx(
        theirs.evaluate(as_pairs)["eval_loss"], rel=RELATIVE
    )
    assert_close_to_their_size(moves(ours, ranked), moves(theirs, as_pairs))


def test_steps_by_hand_are_a_training_run() -> None:
    by_hand, whole = (reward(epochs=2) for _ in range(2))
    rows = []
    while len(rows) < by_hand.steps:
        rows.append(by_hand.step([PAIRS[index] for index in by_hand.sampler.next_batch()]))
    history = without_clock(whole.train().history)
    assert [row["loss"] for row in rows] == [row["loss"] for row in history]
    for name, value in trained(whole).items():
        assert torch.equal(trained(by_hand)[name], value), name


# -- what is reported --------------------------------------------------------------------------------


def test_an_evaluation_is_what_its_scores_say() -> None:
    trainer = reward(eval_data=UNSEEN)
    trainer.train()
    scores = [row["scores"] for row in trainer.predict(UNSEEN)]
    leads = [w - r for w, r in scores]
    flat = [score for both in scores for score in both]
    lengths = [len(answer) for row in UNSEEN for answer in row["continuation_ids"]]
    expected = {
        "eval_loss": sum(math.log1p(math.exp(-lead)) for lead in leads) / 3,
        "eval_log_loss": sum(math.log1p(math.exp(-lead)) for lead in leads) / 3,
        "eval_accuracy": sum(lead > 0 for lead in leads) / 3,
        "eval_margin": sum(leads) / 3,
        "eval_tie_rate": 0.0,
        "eval_reward_mean": sum(flat) / 6,
        "eval_reward_min": min(flat),
        "eval_reward_max": max(flat),
        "eval_reward_std": float(np.std(flat)),
        "eval_reward_chosen": sum(w for w, _ in scores) / 3,
        "eval_reward_rejected": sum(r for _, r in scores) / 3,
        "eval_length_correlation": spearmanr(flat, lengths).statistic,
        "eval_longer_wins_accuracy": sum(
            one > two for one, two in zip(lengths[::2], lengths[1::2], strict=True)
        )
        / 3,
    }
    assert len({int(10 * (sigmoid(abs(lead)) - 0.5) * 2) for lead in leads}) == 3, "a bin of its own for each"
    gaps = [abs(sigmoid(abs(lead)) - (lead > 0)) for lead in leads]
    expected["eval_calibration_error"] = sum(gaps) / 3
    found = trainer.evaluate()
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=RELATIVE)
    assert found == trainer.evaluate(UNSEEN)


@pytest.mark.parametrize("options", [{}, {"max_tokens": 40}, {"eval_batch_size": 1}], ids=str)
def test_an_evaluation_reads_each_answer_once(options: dict[str, Any]) -> None:
    """Micro-batches take rows in another order; scores find back to theirs."""
    trainer = reward(eval_data=UNSEEN, **options)
    predicted = trainer.answers(UNSEEN)
    read: list[int] = []
    hook = trainer.engine.scorer.register_forward_hook(
        lambda _, given, __: read.append(given[0].continuations)
    )
    found = trainer.evaluate()
    hook.remove()
    assert sum(read) == 2 * len(UNSEEN)
    expected = {f"eval_{name}": value for name, value in pair_metrics(predicted).items()}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=RELATIVE)


def test_an_objective_that_scores_nothing_is_refused_by_an_evaluation() -> None:
    class Constant:
        def counts(self, batch: Any) -> Any:
            return {"nothing": torch.ones(())}

        def __call__(self, model: Any, batch: Any) -> Any:
            return ft.objectives.SFT().of(Scored(torch.zeros_like(batch.weights_N)), batch)

    trainer = reward(objective=Constant())
    with pytest.raises(CapabilityError, match=r"expected an objective that scores every row \(3\), got .* 0"):
        trainer.evaluate(UNSEEN)


def test_the_area_under_the_curve_is_scikit_learns() -> None:
    trainer = reward()
    answers = trainer.answers(PAIRS)
    scores = [score for row in trainer.predict(PAIRS) for score in row["scores"]]
    expected = roc_auc_score([1, 0] * len(PAIRS), scores)
    assert f"AUC = {expected:.2f}" in plots.roc(answers).axes[0].get_legend().get_texts()[0].get_text()
    assert [answer.scores for answer in answers] == [row["scores"] for row in trainer.predict(PAIRS)]


def test_files_are_told_apart(tokenizer: Any, tmp_path: Path) -> None:
    half = len(RECORDS) // 2
    records = [
        {**row, "_source": f"{name}:{index}"}
        for index, row in enumerate(RECORDS)
        for name in ["a.jsonl" if index < half else "b.jsonl"]
    ]
    trainer = from_records(tokenizer)
    encoded = [
        {**row, "source": record["_source"]} for row, record in zip(trainer.train_data, records, strict=True)
    ]
    found = trainer.evaluate(encoded)
    accuracies = [trainer.evaluate(part)["eval_accuracy"] for part in (encoded[:half], encoded[half:])]
    assert [found["eval_a.jsonl/accuracy"], found["eval_b.jsonl/accuracy"]] == accuracies
    assert found["eval_accuracy"] == pytest.approx(sum(accuracies) / 2)


def test_score_is_what_predict_says_of_the_pair(tokenizer: Any) -> None:
    trainer = from_records(tokenizer)
    chosen = [row["scores"][0] for row in trainer.predict(RECORDS)]
    rejected = [row["scores"][1] for row in trainer.predict(RECORDS)]
    assert trainer.score(PROMPTS, ANSWERS) == pytest.approx(chosen, rel=RELATIVE)
    assert trainer.score(PROMPTS, [row["rejected"] for row in RECORDS]) == pytest.approx(
        rejected, rel=RELATIVE
    )


def test_one_string_is_no_list_of_prompts_to_score(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"got a string\. Put it into a list"):
        from_records(tokenizer).score("yes", "no!")


def test_score_lays_out_prompts_as_the_data_were(tokenizer: Any) -> None:
    """The trainer's own encoder, not the default one, also of messages."""
    base = formatters.prompt_completion(separator=" => ")
    encoder = Encoder(tokenizer, formatter=formatters.preference(base))
    trainer, plain = from_records(tokenizer, encoder=encoder), from_records(tokenizer)
    chosen = [row["scores"][0] for row in trainer.predict(RECORDS)]
    assert trainer.score(PROMPTS, ANSWERS) == pytest.approx(chosen, rel=RELATIVE)
    assert trainer.score(PROMPTS, ANSWERS) != pytest.approx(plain.score(PROMPTS, ANSWERS), rel=1e-3)


def test_score_of_messages_is_that_of_the_data(tokenizer: Any) -> None:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    prompts = [turn("user", prompt) for prompt in PROMPTS]
    answers = [turn("assistant", answer.strip()) for answer in ANSWERS]
    rows = [
        {"prompt": prompt, "chosen": answer, "rejected": turn("assistant", "no.")}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    trainer = from_records(tokenizer, data=rows)
    expected = [row["scores"][0] for row in trainer.predict(rows)]
    assert trainer.score(prompts, answers) == pytest.approx(expected, rel=RELATIVE)


def test_a_score_is_that_of_its_row_alone(tokenizer: Any) -> None:
    """R2; for every adapter in `tests/matrix`."""
    trainer = from_records(tokenizer)
    together = trainer.score(PROMPTS, ANSWERS)
    alone = [trainer.score([prompt], [answer])[0] for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    assert alone == pytest.approx(together, rel=RELATIVE)


# -- the head, and what is saved ---------------------------------------------------------------------


def plain_scores(model: Any, tokenizer: Any, rows: Any, side: str) -> list[float]:
    """Transformers' own, of the chosen answers in one padded batch."""
    ids = [[*row["prefix_ids"], *row["continuation_ids"][0]] for row in rows]
    batch = tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        found: list[float] = model.eval()(**batch).logits[:, 0].tolist()
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_what_is_saved_scores_alike_in_plain_transformers(
    adapter: str, side: str, tokenizer: Any, tmp_path: Path
) -> None:
    """Padded on either side, by a tokenizer whose pad token was its EOS."""
    trainer = from_records(tokenizer, adapter, learning_rate=1e-2)
    base = tmp_path / "base"
    trainer.train()
    expected = trainer.score(PROMPTS, ANSWERS)
    trainer.save(tmp_path / "saved")
    found = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert found.pad_token_id != found.eos_token_id == tokenizer.pad_token_id
    if adapter == "full":
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    else:
        language = tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
        language.save_pretrained(base)
        bare = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=1, pad_token_id=found.pad_token_id
        )
        plain = PeftModel.from_pretrained(bare, str(tmp_path / "saved"))
    assert plain_scores(plain, found, trainer.train_data, side) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_head_moves_and_comes_back_from_what_was_saved(
    adapter: str, tokenizer: Any, tmp_path: Path
) -> None:
    """R4."""
    trainer = from_records(tokenizer, adapter, learning_rate=1e-2)
    before = head(trainer)
    trainer.train()
    after = head(trainer)
    assert float((after - before).norm()) > 1e-3
    expected = trainer.score(PROMPTS, ANSWERS)
    trainer.save(tmp_path / "saved")
    base = tmp_path / "saved"
    given = {}
    if adapter == "lora":
        base, given = tmp_path / "base", {"adapter": tmp_path / "saved"}
        tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(base)
        tokenizer.save_pretrained(base)
    torch.manual_seed(9)  # a head drawn now would be another one
    model, found = ft.load(base, task="reward", dtype="float32", **given)
    again = reward(adapter=None, model=model.requires_grad_(True), data=RECORDS, tokenizer=found)
    assert again.score(PROMPTS, ANSWERS) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_merged_reward_model_scores_as_its_adapter_did(tokenizer: Any, tmp_path: Path) -> None:
    trainer = from_records(tokenizer, learning_rate=1e-2)
    trainer.train()
    expected = trainer.score(PROMPTS, ANSWERS)
    merged = merge(trainer.model).requires_grad_(True)
    again = reward(adapter=None, model=merged, data=RECORDS, tokenizer=tokenizer)
    assert again.score(PROMPTS, ANSWERS) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_model_by_name_is_made_a_reward_model(tokenizer: Any, tmp_path: Path) -> None:
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    trainer = RewardTrainer(tmp_path, RECORDS, adapter=lora(4), config=ft.TrainConfig(progress="off"))
    assert trainer.step(RECORDS)["loss"] > 0
    assert len(trainer.score(PROMPTS, ANSWERS)) == len(PROMPTS)


# -- what is refused ---------------------------------------------------------------------------------


def test_a_reward_model_writes_no_text() -> None:
    with pytest.raises(
        CapabilityError, match=r"generate: .*got a reward model, which scores it\. Use score\(\)"
    ):
        reward().generate(["yes?"])


def test_options_beside_an_objective_of_ones_own_are_refused() -> None:
    with pytest.raises(ConfigError, match="center has no effect beside an objective of your own"):
        reward(objective=Reward(), center=0.1)
    with pytest.raises(ConfigError, match="center: expected a finite number >= 0"):
        reward(center=-1.0)


def test_a_language_model_with_an_adapter_is_to_be_merged_first() -> None:
    with pytest.raises(CapabilityError, match=r"ftlib\.adapters\.merge"):
        reward(model=moved(attach(tiny_model(), lora(2))))


def test_a_plain_reward_model_is_trained_further() -> None:
    first = reward(adapter="full", epochs=2)
    first.train()
    before = first.predict(PAIRS)
    second = reward(adapter=full(), model=first.model)
    assert second.predict(PAIRS) == before
    assert_close(head(second), head(first))


@pytest.mark.parametrize(("prompts", "answers"), [([], []), (PROMPTS, ANSWERS[:2])])
def test_completions_without_their_prompts_are_refused(prompts: Any, answers: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="one per prompt, got"):
        from_records(tokenizer).score(prompts, answers)


def test_a_completion_that_the_encoder_drops_is_refused(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, max_length=50, overflow="drop")
    trainer = from_records(tokenizer, encoder=encoder)
    assert len(trainer.score(PROMPTS, ANSWERS)) == len(PROMPTS)
    with pytest.raises(DataError, match=r"one example per completion \(2\), got 1"):
        trainer.score(PROMPTS[:2], [ANSWERS[0], " yes" * 100])
