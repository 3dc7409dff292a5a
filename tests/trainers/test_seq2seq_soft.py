"""Soft prompts that an encoder reads: n rows, peft's own results, training, generation, saving, resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig
from torch.testing import assert_close

import ftlib as ft
from ftlib.adapters import attach, p_tuning, prefix, prompt
from ftlib.data.collate import collate
from ftlib.errors import CapabilityError
from ftlib.models import forward
from ftlib.trainers import DPOTrainer
from tests.packed import random_batch, random_groups
from tests.seq2seq import SHAPES, START, t5_model
from tests.trainers.preferences import preference_trainer
from tests.trainers.runs import CUTS, assert_same, run, stop_after
from tests.trainers.test_seq2seq import ANSWERS, PROMPTS, ROWS, TOKENIZER, model_for
from tests.trainers.tiny import rows

N = 5
SOFT: dict[str, Any] = {
    "prompt": lambda: prompt(N),
    "p_tuning lstm": lambda: p_tuning(N, encoder="lstm"),
    "p_tuning mlp": lambda: p_tuning(N, encoder="mlp"),
    "of peft": lambda: PromptTuningConfig(num_virtual_tokens=N, task_type="SEQ_2_SEQ_LM"),
}
RATES = {"prompt": 5e-2, "p_tuning lstm": 5e-3, "p_tuning mlp": 5e-3, "of peft": 5e-2}
GROUPS, BATCH = random_groups(SHAPES), random_batch(SHAPES)


def soft(kind: str, **changes: Any) -> PeftModel:
    torch.manual_seed(0)
    return attach(t5_model(**changes), SOFT[kind]())


@pytest.mark.parametrize("kind", SOFT)
def test_there_are_n_rows_and_all_of_them_are_read(kind: str) -> None:
    """Peft would make n more for the decoder, which nothing reads."""
    model = soft(kind)
    (encoder,) = model.prompt_encoder.values()
    assert encoder.embedding.weight.shape == (N, 32)
    forward(model, BATCH).logprobs_N.sum().backward()
    assert (encoder.embedding.weight.grad.abs().sum(1) > 0).all()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    assert all(weight.grad is not None and weight.grad.any() for weight in trained)


@pytest.mark.parametrize("kind", SOFT)
def test_the_forward_says_what_peft_says_of_one_row_at_a_time(kind: str) -> None:
    model = soft(kind).eval()
    expected = []
    with torch.no_grad():
        for member in GROUPS:
            for ids in member.continuation_ids:
                read = torch.cat([torch.tensor([START]), ids[:-1]])[None]
                logits = model(input_ids=member.prefix_ids[None], decoder_input_ids=read).logits[0]
                expected.append(logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0])
        assert_close(forward(model, BATCH).logprobs_N, torch.cat(expected), rtol=1e-5, atol=2e-5)


def test_switched_off_is_the_base() -> None:
    model = soft("prompt").eval()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(forward(model, BATCH).logprobs_N, forward(t5_model(), BATCH).logprobs_N)


@pytest.mark.parametrize("kind", SOFT)
def test_what_is_learned_is_saved_and_written_by_plain_peft(kind: str, tmp_path: Path) -> None:
    config = ft.TrainConfig(max_steps=30, learning_rate=RATES[kind], schedule="constant", progress="off")
    trainer = ft.SFTTrainer(
        model_for(TOKENIZER), ROWS, tokenizer=TOKENIZER, adapter=SOFT[kind](), config=config
    )
    before = trainer.evaluate(ROWS)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(ROWS)["eval_loss"] < before - 0.2
    written = trainer.generate(PROMPTS, max_new_tokens=8)
    assert written == [trainer.generate([prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
    trainer.save(tmp_path)

    plain = PeftModel.from_pretrained(model_for(TOKENIZER), tmp_path).eval()
    row = {
        "input_ids": torch.tensor([TOKENIZER(PROMPTS[0]).input_ids]),
        "labels": torch.tensor([TOKENIZER(ANSWERS[0]).input_ids]),
    }
    with torch.no_grad():
        assert_close(plain(**row).logits, trainer.model.eval()(**row).logits, rtol=1e-6, atol=1e-6)
    ids_1L = plain.generate(
        input_ids=row["input_ids"], attention_mask=torch.ones_like(row["input_ids"]), max_new_tokens=8
    )
    assert TOKENIZER.decode(ids_1L[0], skip_special_tokens=True) == written[0]


def test_eight_rows_are_learned_by_half() -> None:
    """Forty virtual tokens; the model is random and never moves."""
    torch.manual_seed(0)
    ids = torch.randint(3, 97, (8, 8)).tolist()
    data = [
        {
            "prefix_ids": row[:4],
            "prefix_weights": [0.0] * 4,
            "continuation_ids": [row[4:]],
            "continuation_weights": [[1.0] * 4],
            "length": 8,
            "source": "rows:1",
        }
        for row in ids
    ]
    config = ft.TrainConfig(max_steps=80, learning_rate=0.2, schedule="constant", progress="off")
    trainer = ft.SFTTrainer(t5_model(), data, adapter=prompt(40), config=config)
    before = trainer.evaluate(data)["eval_loss"]
    base = {name: weight.clone() for name, weight in trainer.model.get_base_model().named_parameters()}
    trainer.train()
    assert trainer.evaluate(data)["eval_loss"] <= before / 2
    for name, weight in trainer.model.get_base_model().named_parameters():
        assert torch.equal(weight, base[name]), name


@pytest.mark.parametrize("kind", ["prompt", "p_tuning lstm"])
def test_a_resumed_run_is_the_one_that_was_not_stopped(kind: str, tmp_path: Path) -> None:
    def start(folder: Path | None, **more: Any) -> Any:
        model = t5_model(dropout_rate=0.2)
        more |= {"adapter": SOFT[kind](), "max_tokens": CUTS["3"], "resume": bool(folder)}
        return run(folder, model=model, **more)

    assert start(tmp_path, callbacks=[stop_after(3)]).result.stopped_by == "callback"
    assert_same(start(tmp_path), start(None))


@pytest.mark.parametrize("kind", SOFT)
def test_dpo_starts_at_ln_2(kind: str) -> None:
    trainer = preference_trainer(
        DPOTrainer, model=soft(kind), adapter=None, max_steps=10, learning_rate=RATES[kind] / 5
    )
    history = trainer.train().history
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[-1]["margin"] > 0


def test_micro_batches_change_neither_loss_nor_gradient() -> None:
    def step(tokens: int) -> dict[str, float]:
        torch.manual_seed(0)
        config = ft.TrainConfig(max_steps=1, batch_size=8, max_tokens=tokens, progress="off")
        return ft.SFTTrainer(t5_model(), rows(8), adapter=prompt(N), config=config).step(rows(8))

    whole, *cut = (step(tokens) for tokens in (1000, 40, 1))
    for row in cut:
        assert row == pytest.approx(whole, rel=1e-4)


def test_a_padded_prompt_is_scored_like_a_single_one() -> None:
    """The virtual tokens stand directly before the text."""
    model = soft("prompt").eval()
    with torch.no_grad():
        alone = [forward(model, collate([member], score_all=True)).logprobs_N for member in GROUPS]
        together = forward(model, BATCH).logprobs_N
    assert_close(together, torch.cat(alone), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "adapter",
    [prefix(N), PrefixTuningConfig(num_virtual_tokens=N, task_type="SEQ_2_SEQ_LM")],
    ids=["ours", "of peft"],
)
def test_a_prefix_is_refused_by_name(adapter: Any) -> None:
    with pytest.raises(CapabilityError, match="a decoder for a prefix, got the encoder-decoder T5For"):
        attach(t5_model(), adapter)
