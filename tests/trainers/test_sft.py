"""The SFT trainer in use: steps, evaluation, prediction, callbacks, the best weights, generation, saving."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import EarlyStoppingCallback, TrainerCallback

from ftlib.adapters import lora
from ftlib.data import Encoder, collate, formatters
from ftlib.engine import PPOConfig, TrainConfig
from ftlib.errors import ConfigError, DataError
from ftlib.trainers import SFTTrainer
from tests.data.tokenizers_zoo import tiny as tiny_tokenizer
from tests.models_zoo import tiny_model
from tests.trainers.runs import DATA, EVAL, RISING, Run, assert_same, run, stop_after
from tests.trainers.tiny import At, rows, sft, trained

RELATIVE = 1e-5  # float32: flat against padded, fused against plain
RECORDS = [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(6)]


def plain_loss(model, example) -> tuple[float, float]:
    """Loss of one row and its weight, from the model's own logits."""
    ids = torch.tensor([example["prefix_ids"] + example["continuation_ids"][0]])
    weights = torch.tensor(example["continuation_weights"][0])
    with torch.no_grad():
        logprobs = model.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1)
    nll = -logprobs.gather(-1, ids[0, 1:, None])[-len(weights) :, 0]
    return float(weights @ nll / weights.sum()), float(weights.sum())


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_evaluate_and_predict_are_the_models_own_loss(batch_size):
    trainer = sft(eval_data=EVAL, eval_batch_size=batch_size)
    by_row = [plain_loss(trainer.model, example) for example in EVAL]
    total = sum(loss * weight for loss, weight in by_row) / sum(weight for _, weight in by_row)
    metrics = trainer.evaluate()
    assert metrics == {
        "eval_loss": pytest.approx(total, rel=RELATIVE),
        "eval_perplexity": math.exp(metrics["eval_loss"]),
    }
    assert trainer.predict(EVAL) == [
        {"loss": pytest.approx(loss, rel=RELATIVE), "weight": pytest.approx(weight)}
        for loss, weight in by_row
    ]
    assert trainer.evaluate(EVAL[:1])["eval_loss"] == pytest.approx(by_row[0][0], rel=RELATIVE)


def test_evaluating_changes_nothing():
    trainer = sft(adapter="lora dropout", eval_data=EVAL)
    modes, state, weights = (
        [m.training for m in trainer.model.modules()],
        torch.get_rng_state(),
        trained(trainer),
    )
    assert trainer.evaluate() == trainer.evaluate(), "dropout is off"
    assert [m.training for m in trainer.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in trained(trainer).items())


def test_evaluating_without_data_says_what_to_give():
    with pytest.raises(ConfigError, match="eval_dataset"):
        sft().evaluate()
    with pytest.raises(ConfigError, match="eval_steps has no effect without data"):
        sft(eval_steps=1)


def test_train_is_a_loop_over_step():
    looped, trained_ = sft(shuffle=False), sft(shuffle=False)
    data = rows(10)
    expected = [looped.step(data[start : start + 4]) for start in (0, 4, 8)]
    history = trained_.train().history
    assert [{name: row[name] for name in expected[0]} for row in history] == expected
    assert all(torch.equal(value, trained(looped)[name]) for name, value in trained(trained_).items())


def test_step_counts_steps_and_tokens():
    trainer = sft()
    first, second = trainer.step(DATA[:2]), trainer.step(collate(DATA[2:3]))
    assert (first["step"], second["step"]) == (1, 2)
    assert second["tokens"] == sum(row["length"] for row in DATA[:3])


def test_a_step_past_the_plan_says_once_that_it_teaches_nothing(caplog):
    trainer = sft(max_steps=2)
    for _ in range(2):
        trainer.step(rows(2))
    assert "past the 2" not in caplog.text
    before = trained(trainer)
    for _ in range(2):
        trainer.step(rows(2))
    assert all(torch.equal(before[name], value) for name, value in trained(trainer).items())
    assert caplog.text.count("past the 2 that were planned") == 1


def test_training_again_says_that_nothing_is_left(caplog):
    trainer = sft(max_steps=2)
    trainer.train()
    assert "none is left" not in caplog.text
    before = trained(trainer)
    assert trainer.train().metrics["steps"] == 2
    assert all(torch.equal(before[name], value) for name, value in trained(trainer).items())
    assert "all 2 planned steps are made, and none is left" in caplog.text


def test_a_step_past_the_plan_of_a_constant_schedule_needs_no_telling(caplog):
    trainer = sft(max_steps=1, schedule="constant")
    for _ in range(3):
        trainer.step(rows(2))
    assert "planned" not in caplog.text


def test_training_lowers_the_loss_and_moves_only_what_is_trained():
    trainer = sft(data=DATA[:4], max_steps=30, learning_rate=1e-2, eval_data=DATA[:4])
    base = {n: w.detach().clone() for n, w in trainer.model.named_parameters() if not w.requires_grad}
    before, weights = trainer.evaluate()["eval_loss"], trained(trainer)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 1
    assert all(torch.equal(w, base[n]) for n, w in trainer.model.named_parameters() if n in base)
    assert all(not torch.equal(value, weights[name]) for name, value in trained(trainer).items())


def test_history_says_where_and_how_fast():
    result = sft(data=DATA, log_steps=2, eval_data=EVAL, eval_steps=2).train()
    logged = [row for row in result.history if "loss" in row]
    assert [row["step"] for row in logged] == [2, 3], "the last step is always logged"
    assert [row["step"] for row in result.history if "eval_loss" in row] == [2, 3]
    assert logged[0].keys() == {
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens",
        "epoch",
        "tokens_per_second",
        "peak_memory_bytes",
    }
    assert [row["epoch"] for row in logged] == [0.8, 1.0]
    assert result.metrics.keys() >= {
        "loss",
        "steps",
        "tokens",
        "tokens_per_second",
        "peak_memory_bytes",
        "seconds",
    }
    assert (result.metrics["steps"], result.metrics["examples"], result.stopped_by) == (3, 10, None)


def test_callbacks_may_ask_for_a_log_an_evaluation_and_a_checkpoint(tmp_path):
    def ask(control) -> None:
        control.should_log = control.should_evaluate = control.should_save = True

    callback = At("on_step_end", 2, ask)
    result = sft(data=DATA, log_steps=100, eval_data=EVAL, output_dir=tmp_path, callbacks=[callback]).train()
    assert [row["step"] for row in result.history if "loss" in row] == [2, 3]
    assert [row["step"] for row in result.history if "eval_loss" in row] == [2]
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "3"]


def test_a_callback_may_call_a_planned_evaluation_off():
    class NoEvaluation(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = False

    result = sft(eval_data=EVAL, eval_steps=1, callbacks=[NoEvaluation]).train()
    assert not any("eval_loss" in row for row in result.history)


@pytest.mark.parametrize("report_to", [(), None, "none", [], ["none"]])
def test_no_tracker_is_no_tracker(report_to):
    trainer = sft(report_to=report_to)
    assert len(trainer.callbacks.callbacks) == 1, "the progress display"
    assert trainer.train().metrics["steps"] == 3


@pytest.fixture(scope="module")
def every_evaluation() -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Loss and weights after every step of the run that nothing stops."""
    weights = []

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            weights.append(trained(trainer))

    options = RISING | {"load_best": False, "metric_for_best": None}
    trainer = sft(data=DATA, callbacks=[Keep], **options)
    losses = [row["eval_loss"] for row in trainer.train().history if "eval_loss" in row]
    return losses, weights


@pytest.mark.parametrize("kept", ["in memory", "in the folder", "across a resume"])
def test_early_stopping_gives_the_best_weights_back(tmp_path, kept, every_evaluation):
    losses, weights = every_evaluation
    best = losses.index(min(losses))
    assert losses[: best + 1] == sorted(losses[: best + 1], reverse=True), "the losses fall, then rise"
    assert 1 < best < len(losses) - 3
    folder = None if kept == "in memory" else tmp_path
    if kept == "across a resume":
        run(folder, callbacks=[EarlyStoppingCallback(2), stop_after(best + 2)], **RISING)
    resume = kept == "across a resume"
    done = run(folder, resume=resume, callbacks=[EarlyStoppingCallback(2)], **RISING)
    assert done.result.stopped_by == "callback"
    assert done.result.metrics["steps"] == best + 3, "two evaluations that were no better"
    assert done.result.metrics["best_step"] == best + 1
    assert done.result.metrics["best_metric"] == losses[best]
    assert all(torch.equal(value, weights[best][name]) for name, value in done.weights.items())


def test_an_unknown_metric_is_named():
    with pytest.raises(ConfigError, match=r"metric_for_best: .*'eval_los'.*'eval_loss'"):
        sft(eval_data=EVAL, eval_steps=1, metric_for_best="los").train()


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def from_records(tokenizer, data=RECORDS, *, encoder=None, **options) -> SFTTrainer:
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=len(tokenizer))
    config = TrainConfig(**{"progress": "off", "max_steps": 2, "learning_rate": 1e-3} | options)
    return SFTTrainer(
        model, data, RECORDS[:2], tokenizer=tokenizer, adapter=lora(4), config=config, encoder=encoder
    )


def test_records_train_as_their_encoding_does(tokenizer):
    encoded = Encoder(tokenizer)(RECORDS)
    given, made = from_records(tokenizer), from_records(tokenizer, encoded)
    assert_same(*(run_of(trainer) for trainer in (given, made)))
    assert given.step(RECORDS[:2])["loss"] == made.step(encoded.select(range(2)))["loss"]
    assert given.evaluate(RECORDS) == made.evaluate(encoded)


def run_of(trainer: SFTTrainer) -> Run:
    result = trainer.train()
    return Run(trainer, trained(trainer), result)


@pytest.mark.parametrize("given", ["encoded", "records"])
def test_the_encoder_of_the_data_encodes_prompts_too(tokenizer, caplog, given):
    """Three rows learned by heart with a separator that the default encoder does not have."""
    encoder = Encoder(tokenizer, formatter=formatters.prompt_completion(separator=" => "))
    data = encoder(RECORDS[:3]) if given == "encoded" else RECORDS[:3]
    options = {"max_steps": 60, "learning_rate": 2e-2, "batch_size": 3}
    trainer = from_records(tokenizer, data, encoder=encoder, **options)
    trainer.train()
    prompts = [row["prompt"] for row in RECORDS[:3]]
    assert trainer.generate(prompts, max_new_tokens=16) == [row["completion"] for row in RECORDS[:3]]
    assert trainer.encoder is encoder
    assert list(trainer.train_data[0]["prefix_ids"]) == trainer.encoder.encode_prompt(prompts[0])
    assert "came encoded" not in caplog.text


def test_a_default_encoder_beside_data_that_came_encoded_is_told_of_once(tokenizer, caplog):
    encoded = Encoder(tokenizer)(RECORDS)
    trainer = SFTTrainer(
        tiny_model("llama", vocab_size=len(tokenizer)), encoded, tokenizer=tokenizer, adapter=lora(4)
    )
    assert "came encoded" not in caplog.text, "nothing is encoded here yet"
    trainer.generate(["yes"], max_new_tokens=1)
    trainer.evaluate(RECORDS)
    assert caplog.text.count("Give the trainer the one that was used: encoder=.") == 1


def test_records_are_encoded_here_and_nothing_needs_telling(tokenizer, caplog):
    from_records(tokenizer).generate(["yes"], max_new_tokens=1)
    assert "came encoded" not in caplog.text


def test_records_without_a_tokenizer_are_refused():
    with pytest.raises(ConfigError, match="tokenizer="):
        SFTTrainer(tiny_model("llama"), RECORDS, adapter=lora(4))


CONTEXT = tiny_model("llama").config.max_position_embeddings


def of_lengths(prefix: int, *continuations: int, source: str) -> dict:
    return {
        "prefix_ids": [5] * prefix,
        "prefix_weights": [0.0] * prefix,
        "continuation_ids": [[6] * length for length in continuations],
        "continuation_weights": [[1.0] * length for length in continuations],
        "length": prefix + sum(continuations),
        "source": source,
    }


def test_rows_longer_than_the_context_are_all_named():
    fits, long = of_lengths(2, CONTEXT - 2, source="fits"), of_lengths(3, CONTEXT - 2, source="long")
    with pytest.raises(DataError, match=rf"got long \({CONTEXT + 1} tokens\), again .*max_length") as caught:
        sft(data=[fits, long, {**long, "source": "again"}])
    assert "fits" not in str(caught.value)


def test_the_context_bounds_each_continuation_and_not_their_sum():
    sft(data=[of_lengths(2, CONTEXT - 2, CONTEXT - 2, source="two answers")])
    with pytest.raises(DataError, match=rf"one is long \({CONTEXT + 1} tokens\)"):
        sft(data=[of_lengths(2, 3, CONTEXT - 1, source="one is long")])


def test_of_comparisons_the_worse_answers_are_said_to_be_unused(tokenizer, caplog):
    pair = {"prompt": "Q", "chosen": " yes", "rejected": " no"}
    other = {"prompt": "R", "chosen": " no", "rejected": " yes"}
    from_records(tokenizer, [pair, other])
    assert "2 of 2 examples compare answers: the best of each is trained" in caplog.text
    caplog.clear()
    from_records(tokenizer)
    assert "compare answers" not in caplog.text


@pytest.mark.parametrize("data", [[], iter(())])
def test_no_data_is_refused(data, tokenizer):
    with pytest.raises(DataError):
        SFTTrainer(tiny_model("llama"), list(data), tokenizer=tokenizer, adapter=lora(4))


def test_a_stream_is_refused_with_what_to_do_instead():
    stream = Dataset.from_list(rows(3)).to_iterable_dataset()
    with pytest.raises(ConfigError, match=r"Dataset\.from_list"):
        sft(data=stream)


def test_generate_completes_prompts_with_the_trained_model(tokenizer):
    """Three rows learned by heart come back, through the formatter they were trained with."""
    trainer = from_records(tokenizer, RECORDS[:3], max_steps=60, learning_rate=2e-2, batch_size=3)
    trainer.train()
    answers = trainer.generate([row["prompt"] for row in RECORDS[:3]], max_new_tokens=16)
    assert answers == [row["completion"] for row in RECORDS[:3]]


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_rows_of_tokens_without_an_embedding_are_all_named(kind):
    known = tiny_model("llama").get_input_embeddings().num_embeddings
    fits, beyond = of_lengths(2, 3, source="fits"), of_lengths(2, 3, source="beyond")
    beyond["continuation_ids"] = [[6, known, 6]]
    again = {**fits, "prefix_ids": [5, known], "source": "again"}
    with pytest.raises(DataError, match=rf"ids below {known}, got others in beyond, again\. ") as caught:
        sft(data=kind([fits, beyond, fits, again]))
    assert caught.value.code == "unknown_token"


def test_one_string_is_no_list_of_prompts(tokenizer):
    with pytest.raises(ConfigError, match=r"list of prompts, got 'yes'"):
        from_records(tokenizer).generate("yes")


@pytest.mark.parametrize("config", [PPOConfig(), {"max_steps": 2}], ids=["PPOConfig", "dict"])
def test_settings_of_another_kind_are_refused(tokenizer, config):
    with pytest.raises(ConfigError, match=rf"expected config as a TrainConfig, got {type(config).__name__}"):
        SFTTrainer(tiny_model("llama"), RECORDS, tokenizer=tokenizer, adapter=lora(4), config=config)


def test_what_is_saved_loads_in_plain_peft(tmp_path, tokenizer):
    trainer = from_records(tokenizer)
    trainer.train()
    trainer.save(tmp_path / "out")
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert set(trainer.encoder.stop_ids) <= set(stops if isinstance(stops, list) else [stops])
    plain = PeftModel.from_pretrained(tiny_model("llama", vocab_size=len(tokenizer)), str(tmp_path / "out"))
    ids = torch.tensor([tokenizer("yes, the answer")["input_ids"]])
    torch.testing.assert_close(plain.eval()(ids).logits, trainer.model.eval()(ids).logits)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Question 0?" in card
    trainer.save(tmp_path / "bare", samples=False)
    assert "Question 0?" not in (tmp_path / "bare" / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_no_result(dtype):
    plain, recomputing = sft(dtype=dtype), sft(dtype=dtype, gradient_checkpointing=True)
    assert recomputing.step(DATA) == pytest.approx(
        plain.step(DATA), rel=1e-5 if dtype == torch.float32 else 1e-2
    )
