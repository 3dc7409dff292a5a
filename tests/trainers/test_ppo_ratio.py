"""The first minibatch is at ratio one, whatever the positions, padding, stop ids, dropout and temperature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ftlib.adapters import lora
from ftlib.batches import Rollout
from ftlib.data import collate
from ftlib.errors import ConfigError
from ftlib.losses import gae, shape_rewards, token_logprobs, whiten
from ftlib.objectives import rollout_scoring
from ftlib.objectives.rollout_scoring import read_rollouts
from ftlib.rollouts import FunctionSampler, Sampled
from ftlib.trainers import PPOTrainer
from tests.models_zoo import EOS, tiny_model
from tests.trainers.ppo_tiny import Captured, ppo

EXACT = 1e-5  # nats of float32 log-probabilities
OTHER_STOP = 7
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}


def own_logprobs(model: Any, row: Rollout, *, temperature: float = 1.0) -> Tensor:
    """Of the completion's tokens [L], from a plain forward of this row alone."""
    ids_1L = torch.cat([row.prompt_ids, row.completion_ids])[None]
    logits_LV = model(input_ids=ids_1L).logits[0, len(row.prompt_ids) - 1 : -1]
    return token_logprobs(logits_LV, row.completion_ids, temperature=temperature)


def read(trainer: PPOTrainer, rows: list[Rollout]) -> list[Rollout]:
    """With the numbers that an update begins with."""
    return read_rollouts(
        rows,
        trainer.engine.scorer,
        critic=trainer.engine.scorer,
        reference=trainer.reference,
        temperature=trainer.config.temperature,
        max_tokens=trainer.engine.max_tokens,
        device=trainer.engine.device,
    )[0]


# -- one path, and the model's own numbers ---------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_sampler_trainer_and_reference_say_what_the_model_says(arch, temperature):
    """P3, P7: prompts of 1 to 7 tokens, padded on the left by the sampler, absolute positions (gpt2)."""
    trainer = ppo(model=arch, temperature=temperature, samples_per_prompt=2, max_tokens=20)
    rows = read(trainer, trainer.rollout(trainer.train_data))
    assert len({len(row.prompt_ids) for row in rows}) > 1
    with torch.no_grad():
        for row in rows:
            expected = own_logprobs(trainer.model.eval(), row, temperature=temperature)
            for found in (row.sampler_logprobs, row.old_logprobs, row.ref_logprobs):
                assert_close(found, expected, rtol=0, atol=EXACT)


def test_completions_of_one_prompt_are_read_together_and_say_what_they_say_alone(monkeypatch):
    trainer = ppo(samples_per_prompt=3, batch_size=12, max_tokens=64)
    rows = trainer.rollout(trainer.train_data)
    alone = [read(trainer, [row])[0] for row in rows]
    shared: list[int] = []

    def counting(groups):
        shared.extend(len(group.continuation_ids) for group in groups)
        return collate(groups)

    monkeypatch.setattr(rollout_scoring, "collate", counting)
    together = read(trainer, rows)
    assert shared
    assert set(shared) == {3}, "each prompt once, with its three completions"
    for ours, theirs in zip(together, alone, strict=True):
        for name in ("old_logprobs", "ref_logprobs", "values"):
            assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=EXACT, equal_nan=True)
        assert ours.end_value == pytest.approx(theirs.end_value, abs=EXACT)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_minibatch_is_at_ratio_one(temperature):
    """P7: at another temperature than the sampler's it would not be."""
    trainer = ppo(model="gpt2", temperature=temperature)
    row = trainer.update(trainer.rollout(trainer.train_data))
    assert row["first_ratio_deviation"] < EXACT
    assert row["sampler_ratio"] == pytest.approx(1.0, abs=EXACT)
    assert row["kl"] == pytest.approx(0.0, abs=EXACT), "the policy is still its reference"


def test_dropout_is_off_for_ratios_and_gradients_and_on_again_afterwards():
    """P6: all dropouts .1, LoRA's too, with live checkpointing; the gradients are those without dropout."""
    captured: dict[float, list[dict[str, Tensor]]] = {}
    for share in (0.0, 0.1):
        watching = Captured()
        model = tiny_model("gpt2", **dict.fromkeys(DROPOUT, share))
        trainer = ppo(
            model=model,
            adapter=lora(4, dropout=share),
            gradient_checkpointing=True,
            callbacks=[watching],
            batch_size=8,
            samples_per_prompt=2,
        )
        watching.trainer = trainer
        trainer.update(rows := trainer.rollout(trainer.train_data))
        captured[share] = watching.steps
        shares = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
        assert shares == ({share} if share else {0.0})
    assert len(captured[0.1]) == 2
    for ours, theirs in zip(captured[0.1], captured[0.0], strict=True):
        for name, gradient in theirs.items():
            assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    noisy = trainer.engine.scorer.train()
    twice = [read_with_dropout(noisy, rows) for _ in range(2)]
    assert not torch.allclose(*twice), "the control: this dropout does act"


def read_with_dropout(scorer: Any, rows: list[Rollout]) -> Tensor:
    return torch.cat([own_logprobs(scorer.model, row).detach() for row in rows])


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_the_first_gradient_is_reinforces(arch):
    """P6: -A grad(log pi) / N, the advantages by the formulas, the log-probabilities by a plain forward."""
    watching = Captured()
    trainer = ppo(
        model=tiny_model(arch, **(DROPOUT if arch == "gpt2" else {"attention_dropout": 0.1})),
        adapter=lora(4, dropout=0.1),
        trained=True,  # so that both factors have a gradient, and the reference is another policy
        reference="adapter_off",
        gradient_checkpointing=True,
        max_grad_norm=float("inf"),
        value_coef=0.0,
        kl_coef=0.2,
        batch_size=8,
        samples_per_prompt=2,
        max_tokens=30,
        callbacks=[watching],
    )
    watching.trainer = trainer
    rows = trainer.rollout(trainer.train_data)
    expected = reinforce(trainer.model.eval(), rows, beta=0.2)
    assert trainer.update(rows)["first_ratio_deviation"] < EXACT
    found = {name: each for name, each in watching.steps[0].items() if "lora" in name}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def reinforce(model: Any, rows: list[Rollout], *, beta: float) -> dict[str, Tensor]:
    """Gradients of the policy by name; a completion without a stop has lost one point."""
    logprobs = [own_logprobs(model, row) for row in rows]
    with model.disable_adapter(), torch.no_grad():
        base = [own_logprobs(model, row) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    log_ratio_BL = pad([(ours - theirs).detach() for ours, theirs in zip(logprobs, base, strict=True)], True)
    mask_BL = pad([row.mask for row in rows], batch_first=True)
    scores_B = torch.tensor([float(row.score or 0) - (not row.finished) for row in rows])
    rewards_BL = shape_rewards(scores_B, log_ratio_BL, mask_BL, beta=beta)
    advantages_BL, _ = gae(rewards_BL, torch.zeros_like(rewards_BL), mask_BL)
    loss = -(whiten(advantages_BL, mask_BL) * pad(logprobs, batch_first=True)).sum() / mask_BL.sum()
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


# -- the stop token ------------------------------------------------------------------------------------


def chance_of(trainer: PPOTrainer, prompt: list[int], token: int) -> float:
    with torch.no_grad():
        return float(trainer.model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)[token])


@pytest.mark.parametrize(("stop", "pad"), [(EOS, EOS), (OTHER_STOP, EOS), (OTHER_STOP, OTHER_STOP)])
def test_the_stop_token_is_trained_like_any_other(stop, pad):
    """P4, P5: padding equal to the end of a sequence, a stop id that is another; a prompt that holds both."""
    prompt = [4, EOS, OTHER_STOP, 5]
    change = {}
    for reward in (1.0, -1.0):
        model = tiny_model("gpt2", pad_token_id=pad)
        trainer = ppo(
            model=model,
            stop=[stop],
            whiten_advantages=False,
            kl_coef=0.0,
            reference=None,
            epochs_per_rollout=1,
        )
        before = chance_of(trainer, prompt, stop)
        row = trainer.step([prompt], [[stop]], [reward])
        assert (row["finished"], row["completion_tokens"], row["score"]) == (1.0, 1.0, reward)
        change[reward] = chance_of(trainer, prompt, stop) - before
    assert change[1.0] > 0 > change[-1.0]


def test_a_completion_ends_at_the_stop_ids_and_nowhere_else():
    """P5: the model's own EOS is an ordinary token, in prompt and completion, if it is no stop id."""
    trainer = ppo(
        stop=[OTHER_STOP],
        data=[{"prefix_ids": [EOS, 5, OTHER_STOP]}],
        samples_per_prompt=64,
        batch_size=64,
        temperature=5.0,
        max_new_tokens=60,
    )
    assert trainer.sampling.stop_ids == (OTHER_STOP,)
    rows = trainer.rollout(trainer.train_data)
    written = [row.completion_ids.tolist() for row in rows]
    assert any(EOS in ids[:-1] for ids in written)
    assert all(OTHER_STOP not in ids[:-1] for ids in written)
    assert [row.finished for row in rows] == [ids[-1] == OTHER_STOP for ids in written]
    assert {row.finished for row in rows} == {True, False}
    assert all(bool(row.mask.all()) for row in rows)


def test_without_stop_ids_every_row_is_finished():
    trainer = ppo(stop=[])
    assert {row.finished for row in trainer.rollout(trainer.train_data)} == {True}


def test_by_default_the_models_own_eos_stops():
    model = tiny_model()
    model.generation_config.eos_token_id = [EOS, OTHER_STOP]
    assert ppo(model=model, stop=None).sampling.stop_ids == (EOS, OTHER_STOP)


# -- warped sampling -----------------------------------------------------------------------------------


def test_a_nucleus_without_log_probabilities_is_refused():
    """P7."""
    told = {"ids": torch.tensor([5, EOS]), "mask": torch.tensor([True, True])}
    silent = FunctionSampler(
        lambda prompts, sampling, seeds: (
            [Sampled(**told, finished=True, stop_reason="stop_id")] * len(prompts)
        )
    )
    trainer = ppo(sampler=silent, top_p=0.9)
    with pytest.raises(ConfigError, match=r"expected log-probabilities from the sampler with top_p=0\.9"):
        trainer.rollout(trainer.train_data)
    with pytest.raises(ConfigError, match="expected sampler_logprobs"):
        trainer.step([[5]], [[6, EOS]], [1.0])


@pytest.mark.parametrize("options", [{"top_p": 0.8}, {"top_k": 5}], ids=str)
def test_a_nucleus_with_log_probabilities_trains_with_weights(options):
    """The sampler's distribution is sharper than the policy's, so no token weighs more than one."""
    trainer = ppo(**options)
    rows = read(trainer, trainer.rollout(trainer.train_data))
    for row in rows:
        assert bool((row.sampler_logprobs >= row.old_logprobs - EXACT).all())
    prepared = trainer.objective.prepare(rows, beta=0.0)
    lightest = min(float(each["importance"][0].min()) for each in prepared.rows)
    assert lightest < 1
    assert trainer.update(rows)["first_ratio_deviation"] < EXACT
