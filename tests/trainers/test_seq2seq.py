"""Encoder-decoders in the trainers: what they learn, write, save, resume, and what is refused."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
)

import ftlib as ft
from ftlib.adapters import attach, full, ia3, lora
from ftlib.data import Encoder
from ftlib.errors import CapabilityError, ConfigError, DataError
from ftlib.models import AdapterOff, Snapshot
from ftlib.trainers import DPOTrainer, PPOTrainer, RewardTrainer, SFTTrainer
from tests.models_zoo import tiny_model
from tests.seq2seq import COUPLES, ROWS, t5_config, t5_model, t5_tokenizer
from tests.trainers.preferences import moved, preference_run, preference_trainer
from tests.trainers.runs import CUTS, assert_same, run, stop_after
from tests.trainers.tiny import trained

TOKENIZER = t5_tokenizer()
PROMPTS = [row["prompt"] for row in ROWS]
ANSWERS = [row["completion"] for row in ROWS]
LN_2 = math.log(2)
RATES = {"full": 3e-3, "lora": 1e-2}
ADAPTERS = {"full": full, "lora": lambda: lora(8)}


def model_for(tokenizer: Any, **changes: Any) -> Any:
    """A T5 of width 64 with transformers' own initial weights."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"vocab_size": len(tokenizer), "d_model": 64, "d_kv": 16, "d_ff": 128}
    config = t5_config(**ids, **sizes, decoder_start_token_id=tokenizer.pad_token_id, **changes)
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def trainer_of(kind: str, rows: Any = ROWS, **options: Any) -> SFTTrainer:
    """A trainer of `ADAPTERS`; options are those of the trainer and of its config."""
    tokenizer, encoder = options.pop("tokenizer", TOKENIZER), options.pop("encoder", None)
    model = options.pop("model", None) or model_for(tokenizer)
    config = {"max_steps": 60, "batch_size": 3, "log_steps": 20, "schedule": "constant", "progress": "off"}
    return SFTTrainer(
        model,
        rows,
        tokenizer=tokenizer,
        adapter=ADAPTERS[kind](),
        encoder=encoder,
        config=ft.TrainConfig(learning_rate=RATES[kind], **(config | options)),
    )


# -- SFT -------------------------------------------------------------------------------------------


def test_the_first_loss_is_that_of_transformers_collator_and_model() -> None:
    """Labels padded with -100; the pad is the unknown token."""
    trainer = trainer_of("full")
    features = [
        {"input_ids": TOKENIZER(row["prompt"]).input_ids, "labels": TOKENIZER(row["completion"]).input_ids}
        for row in ROWS
    ]
    batch = DataCollatorForSeq2Seq(TOKENIZER)(features)
    with torch.no_grad():
        own = trainer.model(**batch).loss.item()
    assert trainer.evaluate(ROWS)["eval_loss"] == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_rows_are_memorised_and_written_by_plain_transformers(kind: str, tmp_path: Path) -> None:
    """Loss at most a twentieth; what is saved writes the same answers with no ftlib."""
    trainer = trainer_of(kind, max_steps=120)
    before = trainer.evaluate(ROWS)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(ROWS)["eval_loss"] < before / 20
    assert trainer.generate(PROMPTS) == ANSWERS
    trainer.save(tmp_path)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    plain: Any
    if kind == "full":
        plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    else:
        plain = PeftModel.from_pretrained(model_for(TOKENIZER), tmp_path).eval()
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    written = plain.generate(**batch, max_new_tokens=40)
    assert tokenizer.batch_decode(written, skip_special_tokens=True) == ANSWERS
    row = {
        "input_ids": torch.tensor([tokenizer(PROMPTS[0]).input_ids]),
        "labels": torch.tensor([tokenizer(ANSWERS[0]).input_ids]),
    }
    with torch.no_grad():
        assert_close(plain(**row).logits, trainer.model.eval()(**row).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_saved_model_is_loaded_as_it_was(kind: str, tmp_path: Path) -> None:
    trainer = trainer_of(kind, max_steps=5)
    trainer.train()
    trainer.save(tmp_path)
    saved = {"adapter": tmp_path} if kind == "lora" else {}
    model, _ = ft.load(model_for(TOKENIZER) if saved else tmp_path, task="seq2seq_lm", **saved)
    again = SFTTrainer(model, ROWS, tokenizer=TOKENIZER, config=ft.TrainConfig(max_steps=1, progress="off"))
    assert again.evaluate(ROWS) == pytest.approx(trainer.evaluate(ROWS), rel=1e-6)
    assert "AutoModelForSeq2SeqLM.from_pretrained(" in (tmp_path / "README.md").read_text()


def test_predictions_are_the_loss_of_each_row() -> None:
    trainer = trainer_of("full")
    predicted = trainer.predict(ROWS)
    lengths = [len(TOKENIZER(answer).input_ids) for answer in ANSWERS]
    assert [row["weight"] for row in predicted] == lengths
    mean = sum(row["loss"] * row["weight"] for row in predicted) / sum(lengths)
    assert trainer.evaluate(ROWS)["eval_loss"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_micro_batches_change_neither_loss_nor_gradient(kind: str) -> None:
    whole, *cut = (trainer_of(kind, max_tokens=tokens).step(ROWS) for tokens in (1000, 40, 1))
    for row in cut:
        assert row == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("way", ["full", "lora dropout"])
def test_stopped_and_resumed_is_the_same_run(way: str, tmp_path: Path) -> None:
    """With dropout in the model too."""

    def start(folder: Path | None, **more: Any) -> Any:
        model = t5_model(dropout_rate=0.2)
        return run(folder, model=model, adapter=way, max_tokens=CUTS["3"], resume=bool(folder), **more)

    for step in (1, 4):
        assert start(tmp_path, callbacks=[stop_after(step)]).result.stopped_by == "callback"
    assert_same(start(tmp_path), start(None))


def test_a_padded_batch_of_prompts_is_answered_like_single_ones() -> None:
    trainer = trainer_of("full", max_steps=20)
    trainer.train()
    prompts = ["What", "Paris is the capital of France. yes", "hello there"]
    together = trainer.generate(prompts, max_new_tokens=12)
    assert together == [trainer.generate([prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert len(set(together)) > 1


def test_beams_and_draws_are_those_of_transformers() -> None:
    trainer = trainer_of("full", max_steps=10)
    trainer.train()
    batch = TOKENIZER(PROMPTS[0], return_tensors="pt", return_token_type_ids=False)
    own = trainer.model.eval().generate(**batch, max_new_tokens=9, num_beams=3)
    text = TOKENIZER.decode(own[0], skip_special_tokens=True)
    assert trainer.generate(PROMPTS[:1], max_new_tokens=9, num_beams=3) == [text]
    drawn = [trainer.generate(PROMPTS, do_sample=True, max_new_tokens=9, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


STARTS = {
    "ia3": (ia3, 3e-2),
    "dora": (lambda: lora(4, dora=True), 1e-2),
    "pissa": (lambda: lora(4, init="pissa"), 3e-3),
    "olora": (lambda: lora(4, init="olora"), 3e-3),
}


@pytest.mark.parametrize("kind", STARTS)
def test_the_other_adapters_start_at_the_base_and_learn(kind: str) -> None:
    make, rate = STARTS[kind]
    config = ft.TrainConfig(max_steps=20, learning_rate=rate, schedule="constant", progress="off")
    base = trainer_of("full").evaluate(ROWS)["eval_loss"]
    trainer = SFTTrainer(model_for(TOKENIZER), ROWS, tokenizer=TOKENIZER, adapter=make(), config=config)
    assert trainer.evaluate(ROWS)["eval_loss"] == pytest.approx(base, rel=1e-5)
    trainer.train()
    assert trainer.evaluate(ROWS)["eval_loss"] < 0.8 * base


LETTERS = "abcdefgh"


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """One id per letter."""
    tokens = {token: index for index, token in enumerate(("<pad>", "</s>", "<unk>", *LETTERS))}
    backend = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.slow
def test_words_that_were_never_seen_are_written_backwards() -> None:
    """Of all words of three letters, one in ten is held out."""
    words = [a + b + c for a in LETTERS for b in LETTERS for c in LETTERS]
    rows = [{"prompt": " ".join(word), "completion": " ".join(reversed(word))} for word in words]
    held_out = rows[::10]
    trainer = trainer_of(
        "full",
        [row for row in rows if row not in held_out],
        tokenizer=letters_tokenizer(),
        max_steps=200,
        batch_size=64,
    )
    trainer.train()
    written = trainer.generate([row["prompt"] for row in held_out], max_new_tokens=6)
    backwards = [row["completion"].replace(" ", "") for row in held_out]
    right = sum(text == word for text, word in zip(written, backwards, strict=True))
    assert right >= 0.9 * len(held_out)


# -- DPO -------------------------------------------------------------------------------------------

dpo = partial(preference_trainer, DPOTrainer)


def adapted(**changes: Any) -> Any:
    torch.manual_seed(0)
    return attach(t5_model(**changes), lora(4))


POLICIES: dict[str, Any] = {
    "full": (lambda: attach(t5_model(), full()), Snapshot),
    "full, with dropout": (lambda: attach(t5_model(dropout_rate=0.3), full()), Snapshot),
    "lora": (adapted, AdapterOff),
    "lora, trained": (lambda: moved(adapted(dropout_rate=0.3)), Snapshot),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_dpo_starts_at_ln_2_and_separates_the_pairs(policy: str) -> None:
    make, reference = POLICIES[policy]
    trainer = dpo(model=make(), adapter=None, max_steps=20, schedule="constant", learning_rate=3e-3)
    assert isinstance(trainer.engine.objective.reference.reference, reference)  # inside its cache
    history = trainer.train().history
    assert history[0]["loss"] == pytest.approx(LN_2, abs=1e-6)
    assert history[-1]["margin"] > 0.1


def test_the_log_probability_of_an_answer_is_that_of_the_decoder_terminator_included() -> None:
    config = ft.TrainConfig(max_steps=1, progress="off")
    trainer = DPOTrainer(model_for(TOKENIZER), COUPLES, tokenizer=TOKENIZER, adapter=lora(4), config=config)
    for couple, row in zip(COUPLES, trainer.predict(COUPLES), strict=True):
        ids = torch.tensor([TOKENIZER(couple["prompt"]).input_ids])
        for side, logp in zip(("chosen", "rejected"), row["logps"], strict=True):
            labels = torch.tensor([TOKENIZER(couple[side]).input_ids])
            with torch.no_grad():
                mean = trainer.model.eval()(input_ids=ids, labels=labels).loss.item()
            assert logp == pytest.approx(-mean * labels.numel(), rel=1e-5)


def test_a_dpo_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    def start(folder: Path | None, **more: Any) -> Any:
        model = moved(adapted(dropout_rate=0.2))
        return preference_run(DPOTrainer, folder, model=model, resume=bool(folder), **more)

    assert start(tmp_path, callbacks=[stop_after(3)]).result.stopped_by == "callback"
    assert_same(start(tmp_path), start(None))


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "task", "other"),
    [(t5_model, "seq2seq_lm", "causal_lm"), (tiny_model, "causal_lm", "seq2seq_lm")],
    ids=["T5", "Llama"],
)
def test_an_encoder_for_the_other_kind_of_model_is_refused(make: Any, task: str, other: Any) -> None:
    with pytest.raises(ConfigError, match=f"an Encoder with task='{task}' for .*, got task='{other}'"):
        trainer_of("lora", model=make(), encoder=Encoder(TOKENIZER, task=other))


def test_a_reference_of_the_other_kind_is_refused() -> None:
    """A decoder would read the policy's prompt and answer as one text."""
    with pytest.raises(ConfigError, match="of the policy's kind, 'seq2seq_lm', got one of 'causal_lm'"):
        dpo(model=t5_model(), reference=tiny_model())
    assert dpo(model=t5_model(), reference=t5_model(seed=1), allow_initial_kl=True, max_steps=1).train()


def test_plain_text_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(DataError, match="a prompt for the encoder to read, got text without a prompt"):
        trainer_of("lora", [{"text": "yes indeed"}])


def test_reward_models_and_ppo_want_a_decoder() -> None:
    def reward(prompts: Any, completions: Any) -> list[float]:
        return [0.0] * len(prompts)

    for kind, data, options in ((RewardTrainer, COUPLES, {}), (PPOTrainer, PROMPTS, {"reward": reward})):
        with pytest.raises(CapabilityError, match="expected a decoder, got the encoder-decoder T5For"):
            kind(model_for(TOKENIZER), data, tokenizer=TOKENIZER, adapter=lora(4), **options)


def test_a_trainer_that_gets_a_name_says_how_to_load_it(tmp_path: Path) -> None:
    t5_model().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Pass task='seq2seq_lm'; a trainer takes the"):
        SFTTrainer(str(tmp_path), ROWS, adapter=lora(4))


def long_row(prompt: int, answer: int) -> list[dict[str, Any]]:
    return [
        {
            "prefix_ids": [5] * prompt,
            "prefix_weights": [0.0] * prompt,
            "continuation_ids": [[6] * answer],
            "continuation_weights": [[1.0] * answer],
            "length": prompt + answer,
            "source": "rows:1",
        }
    ]


def test_prompt_and_answer_have_a_context_each() -> None:
    """BART's 64 positions hold 40 tokens and 40 more, but not 70."""

    def trainer(rows: Any) -> SFTTrainer:
        sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
        heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
        bart = BartConfig(vocab_size=97, encoder_ffn_dim=64, decoder_ffn_dim=64, **sizes, **heads)
        config = ft.TrainConfig(max_steps=1, progress="off")
        return SFTTrainer(t5_model(config=bart), rows, adapter=lora(2), config=config)

    fits = trainer(long_row(40, 40))
    before = trained(fits)
    fits.train()
    assert any(not torch.equal(value, before[name]) for name, value in trained(fits).items())
    for long in (long_row(70, 4), long_row(4, 70)):
        with pytest.raises(DataError, match=r"context of 64 tokens, got rows:1 \(70 tokens\)"):
            trainer(long)
