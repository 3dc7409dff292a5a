"""Every trainer with every soft prompt: what is trained, where each starts, and what a run leaves behind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close

from ftlib.adapters import attach, load_adapter, lora, prompt
from ftlib.batches import Group
from ftlib.data.collate import collate
from ftlib.engine import TrainConfig
from ftlib.errors import CapabilityError, DataError
from ftlib.models import forward
from ftlib.models.heads import as_reward_model
from ftlib.models.references import AdapterOff, Snapshot, make_reference
from ftlib.models.roles import adapters_off
from ftlib.models.sharing import on_same_base
from ftlib.rollouts.rewards import reward_model
from ftlib.trainers import DPOTrainer, RewardTrainer, SFTTrainer
from tests.data.tokenizers_zoo import tiny
from tests.models_zoo import tiny_model
from tests.trainers.ppo_tiny import ppo
from tests.trainers.preferences import pairs, preference_trainer
from tests.trainers.runs import STEPS, assert_same, run, stop_after
from tests.trainers.tiny import rows, sft
from tests.virtual import COUNT, SOFT, soft_model

KINDS = list(SOFT)
BOTH = ("prompt", "prefix")  # rows and a cache


def frozen(model: nn.Module) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in model.named_parameters() if not w.requires_grad}


# -- supervised --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_m2_every_trained_weight_moves_and_the_base_does_not(kind: str) -> None:
    trainer = sft(adapter=SOFT[kind](), learning_rate=None, max_steps=2, schedule="constant")
    base, start = frozen(trainer.model), trainer.engine.masters.copies()
    trainer.train()
    assert len(base) > 10
    for name, weight in trainer.model.named_parameters():
        assert name not in base or torch.equal(weight, base[name])
    for name, weight in trainer.engine.masters.copies().items():
        assert not torch.equal(weight, start[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_m3_eight_rows_are_half_learnt_by_heart(kind: str) -> None:
    """Eight rows of eight tokens, the last four trained; 60 steps."""
    drawn = torch.randint(3, 97, (8, 8), generator=torch.Generator().manual_seed(0)).tolist()
    data = [
        {
            "prefix_ids": ids[:4],
            "prefix_weights": [0.0] * 4,
            "continuation_ids": [ids[4:]],
            "continuation_weights": [[1.0] * 4],
            "length": 8,
            "source": f"rows:{index}",
        }
        for index, ids in enumerate(drawn)
    ]
    rate = 5e-2 if kind in BOTH else 5e-3
    model = tiny_model(hidden_size=48, head_dim=12)
    options = {"batch_size": 8, "max_steps": 60, "schedule": "constant", "log_steps": 1}
    trainer = sft(model=model, adapter=SOFT[kind](), data=data, learning_rate=rate, **options)
    losses = [row["loss"] for row in trainer.train().history]
    assert losses[-1] <= 0.5 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_f22_the_tokens_counted_are_those_of_the_text(kind: str) -> None:
    found, expected = (sft(adapter=each, max_steps=2).train() for each in (SOFT[kind](), lora(4)))
    assert found.metrics["tokens"] == expected.metrics["tokens"]
    assert [row["tokens"] for row in found.history] == [row["tokens"] for row in expected.history]


@pytest.mark.parametrize("kind", KINDS)
def test_m5_a_step_is_the_same_however_it_is_cut(kind: str) -> None:
    norms = []
    for budget in (1000, 30, 1):
        trainer = sft(adapter=SOFT[kind](), data=rows(8), batch_size=8, max_tokens=budget)
        norms.append(trainer.step(rows(8))["grad_norm"])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_f4_a_resumed_run_is_the_run_that_was_not_stopped(kind: str, tmp_path: Path) -> None:
    """The one resumed starts from other virtual tokens, which the checkpoint replaces."""

    def started(seed: int, folder: Path | None, **options: Any) -> Any:
        torch.manual_seed(seed)
        model = attach(tiny_model(), SOFT[kind]())
        return run(folder, model=model, adapter=None, learning_rate=1e-2, max_tokens=30, **options)

    expected = started(0, None)
    started(0, tmp_path, callbacks=[stop_after(STEPS // 2)])
    found = started(1, tmp_path, resume=True)
    assert_same(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_f4_a_checkpoint_holds_what_plain_peft_reads_too(kind: str, tmp_path: Path) -> None:
    made = run(tmp_path, adapter=SOFT[kind](), learning_rate=1e-2)
    folder = max(tmp_path.glob("checkpoint-*"))
    plain, row = PeftModel.from_pretrained(tiny_model(), str(folder)), torch.arange(5, 14)[None]
    assert_close(plain(row).logits, made.trainer.model.eval()(row).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", BOTH)
def test_what_was_memorised_is_written_and_saved(kind: str, tmp_path: Path) -> None:
    tokenizer = tiny("words")
    records = [
        {"prompt": "Question: the quick", "completion": " brown fox"},
        {"prompt": "Question: Paris", "completion": " is the capital"},
    ]
    torch.manual_seed(0)
    model = tiny_model(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    config = TrainConfig(max_steps=80, batch_size=2, learning_rate=3e-2, schedule="constant", progress="off")
    trainer = SFTTrainer(model, records, tokenizer=tokenizer, adapter=SOFT[kind](), config=config)
    trainer.train()
    written = trainer.generate([record["prompt"] for record in records], max_new_tokens=6)
    assert [text.split() for text in written] == [["brown", "fox"], ["is", "the", "capital"]]
    folder = trainer.save(tmp_path / "saved")
    base = tiny_model(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    plain, row = PeftModel.from_pretrained(base, str(folder)), torch.tensor([[8, 9, 10, 11]])
    assert_close(plain(row).logits, trainer.model.eval()(row).logits, rtol=1e-6, atol=1e-6)
    assert f"num_virtual_tokens={COUNT}" in (folder / "README.md").read_text()


def test_the_trainers_tokenizer_splits_the_text_to_start_from() -> None:
    tokenizer = tiny("words")
    model = tiny_model(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2)
    table = model.get_input_embeddings().weight.detach().clone()
    data = [{"prompt": "the quick", "completion": " brown"}]
    adapter = prompt(3, init="text", text="brown fox")
    trainer = SFTTrainer(model, data, tokenizer=tokenizer, adapter=adapter, config=TrainConfig(max_steps=1))
    ids = tokenizer("brown fox", add_special_tokens=False).input_ids
    assert torch.equal(trainer.model.prompt_encoder["default"].embedding.weight, table[[*ids, ids[0]]])


# -- refused or warned of before data are read --------------------------------------------------


@pytest.mark.parametrize("kind", ["prefix", "prefix projection"])
def test_f8_a_prefix_with_checkpointing_is_refused_before_data_are_read(kind: str) -> None:
    with pytest.raises(CapabilityError, match="gradient_checkpointing: expected an adapter that declares"):
        sft(adapter=SOFT[kind](), gradient_checkpointing=True, data=["no row of any kind"])


@pytest.mark.parametrize("kind", ["prompt", "p-tuning lstm", "p-tuning mlp"])
def test_f8_prompts_train_the_same_with_checkpointing(kind: str) -> None:
    runs = [
        sft(adapter=SOFT[kind](), gradient_checkpointing=each, learning_rate=1e-2, max_steps=3).train()
        for each in (False, True)
    ]
    losses = [[row["loss"] for row in each.history] for each in runs]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_f8_a_long_example_needs_no_checkpointing_under_a_prefix() -> None:
    """Others that exceed the budget run alone and checkpointed."""
    trainer = sft(adapter=SOFT["prefix"](), max_tokens=4)
    assert math.isfinite(trainer.step(rows(2))["loss"])


@pytest.mark.parametrize("kind", BOTH)
def test_f11_examples_without_room_for_virtual_tokens_are_named(kind: str) -> None:
    data = rows(1)
    data[0]["prefix_ids"] = [5] * (125 - len(data[0]["continuation_ids"][0]))
    data[0]["prefix_weights"] = [0.0] * len(data[0]["prefix_ids"])
    data[0]["length"] = 125
    with pytest.raises(DataError, match=r"context of 123 tokens, got rows:0 \(125 tokens\)"):
        sft(adapter=SOFT[kind](), data=data)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rate_that_hardly_moves_virtual_tokens_is_warned_of(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    sft(adapter=SOFT[kind](), learning_rate=2e-5)
    assert "learning_rate=2e-05 hardly moves virtual tokens" in caplog.text
    caplog.clear()
    trainer = sft(adapter=SOFT[kind](), learning_rate=None)
    sft(adapter=lora(4), learning_rate=2e-5)
    assert "hardly" not in caplog.text
    assert trainer.learning_rate == SOFT[kind]().capabilities.learning_rate


# -- preferences -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_dpo_starts_at_log_2_from_what_the_policy_is_now(kind: str) -> None:
    trainer = preference_trainer(
        DPOTrainer, adapter=SOFT[kind](), learning_rate=None, max_steps=20, batch_size=10, schedule="constant"
    )
    result = trainer.train()
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result.history[-1]["margin"] > 0


@pytest.mark.parametrize("kind", BOTH)
def test_the_default_reference_is_a_snapshot_and_off_is_the_base(kind: str) -> None:
    model = soft_model(kind)
    assert isinstance(make_reference("auto", model), Snapshot)
    batch = collate(pairs(3))
    now = forward(model, batch).logprobs_N.detach()
    snapshot, off = Snapshot(model), AdapterOff(model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(1.0)
    assert torch.equal(snapshot.logprobs(batch), now)
    assert_close(off.logprobs(batch), forward(tiny_model(), batch).logprobs_N, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(forward(model, batch).logprobs_N, now, atol=1e-2)


@pytest.mark.parametrize("kind", ["p-tuning lstm", "prefix"])
def test_f4_a_resumed_dpo_run_keeps_its_reference(kind: str, tmp_path: Path) -> None:
    def started(seed: int, folder: Path | None, resume: Any = None, **options: Any) -> Any:
        torch.manual_seed(seed)
        model = attach(tiny_model(), SOFT[kind]())
        trainer = preference_trainer(
            DPOTrainer,
            model=model,
            adapter=None,
            output_dir=folder,
            max_steps=5,
            learning_rate=1e-2,
            **options,
        )
        history = trainer.train(resume=resume).history
        return [row["loss"] for row in history], trainer.engine.masters.copies()

    losses, weights = started(0, None)
    started(0, tmp_path, callbacks=[stop_after(2)])
    found, found_weights = started(1, tmp_path, resume=True)
    assert found == losses
    assert all(torch.equal(found_weights[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_tells_separable_pairs_apart_and_is_saved_with_its_head(
    kind: str, tmp_path: Path
) -> None:
    """The better answer ends in another token. Head and virtual tokens are both in the saved adapter."""
    data = pairs(16)
    for row in data:
        for answer, token in zip(row["continuation_ids"], (11, 12), strict=True):
            answer[-2] = token
    trainer = preference_trainer(
        RewardTrainer,
        adapter=SOFT[kind](),
        data=data,
        batch_size=16,
        max_steps=25,
        learning_rate=1e-2,
        schedule="constant",
    )
    trainer.train()
    assert trainer.evaluate(data)["eval_accuracy"] == 1.0
    folder = trainer.save(tmp_path / "reward")
    torch.manual_seed(5)
    plain = PeftModel.from_pretrained(as_reward_model(tiny_model()), str(folder))
    row = torch.tensor([data[0]["prefix_ids"] + data[0]["continuation_ids"][0]])
    own = trainer.model.eval()
    assert_close(plain(input_ids=row).logits, own(input_ids=row).logits, rtol=1e-6, atol=1e-6)


# -- PPO ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ppo_starts_at_ratio_one_and_without_divergence(kind: str) -> None:
    trainer = ppo(adapter=SOFT[kind](), max_steps=2, minibatches=2, samples_per_prompt=2)
    first, second = trainer.train().history
    for row in (first, second):
        assert row["first_ratio_deviation"] < 1e-5
        assert row["sampler_gap"] < 1e-5
    assert abs(first["kl"]) < 1e-5
    assert abs(second["kl"]) > 1e-5


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("arch", ["mistral", "gpt2"])
def test_ppo_starts_at_ratio_one_with_windows_and_absolute_positions(arch: str, kind: str) -> None:
    row = ppo(model=arch, adapter=SOFT[kind](), max_steps=1).train().history[0]
    assert row["first_ratio_deviation"] < 1e-5
    assert row["sampler_gap"] < 1e-5


@pytest.mark.parametrize("kind", BOTH)
def test_a_critic_and_a_reward_share_the_base_and_stay_as_they_are(kind: str, tmp_path: Path) -> None:
    trained = preference_trainer(RewardTrainer, adapter=lora(4), max_steps=2)
    trained.train()
    folder, tokenizer = trained.save(tmp_path / "reward"), tiny("words", template=None)
    trainer = ppo(adapter=SOFT[kind](), critic="adapter", max_steps=2)
    base = trainer.model.get_input_embeddings().weight
    judge = load_adapter(as_reward_model(on_same_base(trainer.model)), folder, trainable=False)
    assert judge.get_input_embeddings().weight is base
    ask = reward_model(judge, tokenizer)
    before = ask(["the quick"], [" brown fox"])
    trainer.train()
    assert ask(["the quick"], [" brown fox"]) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_critics_rate_is_not_that_of_virtual_tokens(kind: str) -> None:
    """Five times LoRA's 4e-5, for a head on the trunk as for an adapter."""
    trainer = ppo(adapter=SOFT[kind](), learning_rate=None)
    rates = {group["lr"] for group in trainer.engine.optimizer.param_groups}
    assert rates == {SOFT[kind]().capabilities.learning_rate, 5 * 4e-5}


@pytest.mark.parametrize("kind", KINDS)
def test_exact_gradients_reach_the_optimum_of_a_bandit(kind: str) -> None:
    """Eight arms from the base's own distribution: J* = beta log sum_a ref(a) exp(score(a) / beta)."""
    beta, score_A = 0.5, torch.linspace(0, 1, 8)
    torch.manual_seed(0)
    model = attach(tiny_model(vocab_size=8), SOFT[kind]())
    group = Group(
        torch.tensor([3, 4]), torch.zeros(2), *(tuple(x.split(1)) for x in (torch.arange(8), torch.ones(8)))
    )
    batch = collate([group], score_all=True)
    with adapters_off(model), torch.no_grad():
        ref_A = forward(model, batch).logprobs_N
    optimum = beta * torch.logsumexp(ref_A + score_A / beta, 0)
    optimizer = torch.optim.Adam(
        [w for w in model.parameters() if w.requires_grad], 2e-2 if kind in BOTH else 3e-3
    )
    for _ in range(80):
        logp_A = forward(model, batch).logprobs_N
        found = (logp_A.exp() * (score_A - beta * (logp_A - ref_A))).sum()
        optimizer.zero_grad()
        (-found).backward()
        optimizer.step()
    assert float(optimum) - 0.01 < float(found.detach()) <= float(optimum) + 1e-6


def test_f4_a_resumed_ppo_run_is_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    """From other virtual tokens: the encoder, the value head and the reference come from the checkpoint."""

    def started(seed: int, folder: Path | None, resume: Any = None, **options: Any) -> Any:
        torch.manual_seed(seed)
        model = attach(tiny_model(), SOFT["p-tuning mlp"]())
        trainer = ppo(model=model, adapter=None, output_dir=folder, max_steps=4, **options)
        history = trainer.train(resume=resume).history
        return [(row["loss"], row["kl"], row["score"]) for row in history], trainer.engine.masters.copies()

    rows_of_all, weights = started(0, None)
    started(0, tmp_path, callbacks=[stop_after(2)])
    found, found_weights = started(1, tmp_path, resume=True)
    assert found == rows_of_all
    assert all(torch.equal(found_weights[name], weight) for name, weight in weights.items())
