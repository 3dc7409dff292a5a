"""PPO's loop: what an update does and leaves alone, and that its ways in are one."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ftlib.adapters import lora
from ftlib.batches import Rollout
from ftlib.data.collate import collate
from ftlib.engine import PPOConfig
from ftlib.errors import CapabilityError, ConfigError, DataError, NonFiniteError, ShapeError
from ftlib.models import forward
from ftlib.models.references import AdapterOff
from ftlib.trainers import PPOTrainer
from tests.models_zoo import EOS, tiny_model
from tests.packed import random_groups
from tests.trainers.ppo_tiny import PROMPTS, Captured, by_tokens, ppo, prompts, sgd, weights
from tests.trainers.tiny import At, without_clock
from tests.trainers.tiny import rows as text_rows

ROUNDING = {"rtol": 1e-5, "atol": 1e-7}


def assert_same_weights(found: PPOTrainer, expected: PPOTrainer, **tolerance: float) -> None:
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if tolerance:
            assert_close(ours[name], value, msg=name, **tolerance)
        else:
            assert torch.equal(ours[name], value), name


def updated(trainer: PPOTrainer, rows: list[Rollout] | None = None) -> dict[str, float]:
    return trainer.update(trainer.rollout(trainer.train_data) if rows is None else rows)


# -- one algorithm, several doors ----------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", None], ids=["lora", "full"])
def test_training_is_the_loop_written_by_hand(adapter):
    """P17: `update(rollout(prompts))`, the same seed, bit for bit."""
    options = {
        "adapter": adapter,
        "shuffle": False,
        "max_steps": 4,
        "samples_per_prompt": 2,
        "kl_target": 1.0,
    }
    trained, by_hand = ppo(**options), ppo(**options)
    history = trained.train().history
    rows = []
    for step in range(4):
        half = PROMPTS[:2] if step % 2 == 0 else PROMPTS[2:]
        rows.append(by_hand.update(by_hand.rollout(half)))
    assert_same_weights(trained, by_hand)
    for logged, row in zip(without_clock(history), rows, strict=True):
        shared = row.keys() & logged.keys()
        assert {name: logged[name] for name in shared} == {name: row[name] for name in shared}
        assert {"loss", "kl", "beta", "score", "approx_kl"} <= shared


@pytest.mark.parametrize("form", ["lists", "tensors"])
def test_a_step_on_the_same_rows_is_an_update(form):
    """P17."""
    collected, given = ppo(samples_per_prompt=2), ppo(samples_per_prompt=2)
    rows = collected.rollout(collected.train_data)
    rows_of = {"lists": lambda ids: ids.tolist(), "tensors": lambda ids: ids}[form]
    expected = collected.update(rows)
    found = given.step(
        [rows_of(row.prompt_ids) for row in rows],
        [rows_of(row.completion_ids) for row in rows],
        [row.score for row in rows],
    )
    assert_same_weights(given, collected)
    for name in ("loss", "kl", "score", "finished", "return", "entropy"):
        assert found[name] == expected[name], name


def test_a_step_takes_masks_ends_and_log_probabilities():
    masked, without = ppo(whiten_advantages=False), ppo(whiten_advantages=False)
    told = masked.step([[4]], [[7, 9, 8]], [1.0], masks=[[True, False, True]], finished=[True])
    assert (told["completion_tokens"], told["finished"]) == (2.0, 1.0)
    cut = without.step([[4]], [[7, 9, 8]], [1.0])
    assert (cut["completion_tokens"], cut["finished"]) == (3.0, 0.0)
    warped = ppo(top_p=0.9)
    assert warped.step([[4]], [[7, EOS]], [1.0], logprobs=[[-0.1, -0.1]])["loss"] != 0


def test_a_rollout_is_of_the_policy_as_it_is_now():
    trainer = ppo(learning_rate=0.05, temperature=0.5)
    before = [row.completion_ids.tolist() for row in trainer.rollout(PROMPTS)]
    again = [row.completion_ids.tolist() for row in trainer.rollout(PROMPTS)]
    assert again == before, "the same iteration draws the same"
    updated(trainer)
    assert [row.completion_ids.tolist() for row in trainer.rollout(PROMPTS)] != before


# -- what an update does -------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 1), (2, 4)])
def test_optimiser_steps_are_epochs_times_minibatches(epochs, minibatches):
    """P9: counted by a callback, and by the schedule, which ends at zero."""
    watching = Captured()
    trainer = ppo(
        epochs_per_rollout=epochs,
        minibatches=minibatches,
        batch_size=8 // minibatches,
        samples_per_prompt=2,
        max_steps=3,
        callbacks=[watching],
    )
    watching.trainer = trainer
    history = trainer.train().history
    assert len(watching.steps) == 3 * epochs * minibatches
    assert [row["optimizer_steps"] for row in history] == [epochs * minibatches] * 3
    assert trainer.engine.schedule.get_last_lr()[0] == 0.0
    assert trainer.engine.optimizer.defaults["eps"] == 1e-5


@pytest.mark.parametrize("max_tokens", [1, 25, 60])
@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_the_size_of_micro_batches_does_not_change_an_update(max_tokens, critic):
    """P8: one row at a time, a few, or all; steps that are linear in the gradient."""
    options = {"optimizer": sgd, "samples_per_prompt": 2, "batch_size": 8, "critic": critic}
    whole, parts = ppo(max_tokens=10_000, **options), ppo(max_tokens=max_tokens, **options)
    rows = whole.rollout(PROMPTS)
    expected, found = whole.update(rows), parts.update(rows)
    assert_same_weights(parts, whole, **ROUNDING)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-6)
    assert found["first_ratio_deviation"] < 1e-5


def test_the_order_of_rows_does_not_change_an_update():
    """In one minibatch; several are drawn by place."""
    options = {"optimizer": sgd, "samples_per_prompt": 2, "batch_size": 8}
    ours, theirs = ppo(**options), ppo(**options)
    rows = ours.rollout(PROMPTS)
    ours.update(rows)
    theirs.update([rows[place] for place in (5, 0, 7, 2, 1, 6, 3, 4)])
    assert_same_weights(ours, theirs, **ROUNDING)


def test_copies_of_a_prompt_share_its_computation_and_nothing_else():
    """Samples of one prompt train as those rows one by one."""
    options = {"optimizer": sgd, "samples_per_prompt": 4, "data": PROMPTS[2:3]}
    together, apart = ppo(**options), ppo(max_tokens=1, **options)
    rows = together.rollout(PROMPTS[2:3])
    sizes = []
    together.engine.scorer.register_forward_pre_hook(lambda _, given: sizes.append(given[0].tokens))
    together.update(rows)
    apart.update(rows)
    shared = len(rows[0].prompt_ids) + sum(len(row.completion_ids) for row in rows)
    assert sizes[-1] == shared < sum(map(len, rows))
    assert_same_weights(together, apart, **ROUNDING)


def test_the_gradient_is_clipped_once_per_step_and_its_norm_is_told():
    """P10."""
    watching = Captured()
    trainer = ppo(max_grad_norm=1e-3, max_tokens=20, callbacks=[watching], epochs_per_rollout=1)
    watching.trainer = trainer
    row = updated(trainer)
    [gradients] = watching.steps
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    assert row["grad_norm"] > 1e-3, "as it was"


def test_a_gradient_that_is_not_finite_leaves_its_step_out():
    """P10: no decay either, and it is counted; the row tells of the steps that were made."""
    trainer = ppo(on_nonfinite="skip", weight_decay=0.1, epochs_per_rollout=3)
    rows = trainer.rollout(trainer.train_data)
    weight = next(iter(trainer.engine.masters.named.values()))
    seen = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        seen.append(weights(trainer))
        return gradient * (math.nan if len(seen) == 2 else 1.0)

    weight.register_hook(spoil)
    row = trainer.update(rows)
    assert trainer.engine.skipped == 1
    first, second, third = seen
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(second[name], third[name]) for name in second), "the second step was none"
    assert any(not torch.equal(third[name], value) for name, value in weights(trainer).items())
    assert all(math.isfinite(row[name]) for name in ("loss", "approx_kl", "clip_fraction", "grad_norm"))


def test_a_loss_that_is_not_finite_is_left_out_of_the_row():
    """P10."""
    trainer, passes = ppo(on_nonfinite="skip", epochs_per_rollout=3), []

    def spoil(module: Any, given: Any, scored: Any) -> Any:
        passes.append(torch.is_grad_enabled())
        return replace(scored, logprobs_N=scored.logprobs_N * (math.nan if sum(passes) == 1 else 1.0))

    trainer.engine.scorer.register_forward_hook(spoil)
    row = updated(trainer)
    assert (trainer.engine.skipped, row["optimizer_steps"]) == (1, 3)
    assert math.isfinite(row["loss"])
    assert row["first_ratio_deviation"] < 1e-5, "of the first step that was made"


def test_by_default_a_gradient_that_is_not_finite_stops():
    trainer = ppo()
    rows = trainer.rollout(trainer.train_data)
    next(iter(trainer.engine.masters.named.values())).register_hook(lambda gradient: gradient * math.nan)
    before = weights(trainer)
    with pytest.raises(NonFiniteError, match="finite loss and gradient"):
        trainer.update(rows)
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


# -- what it leaves alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_only_adapter_and_head_move(critic):
    """P22: the base bit for bit."""
    trainer = ppo(critic=critic, max_steps=3, learning_rate=0.01)
    frozen = {
        name: value.clone() for name, value in trainer.model.named_parameters() if not value.requires_grad
    }
    before = weights(trainer)
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert len(frozen) > 10
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    moved = [name for name, value in weights(trainer).items() if not torch.equal(value, before[name])]
    assert any("lora_B" in name for name in moved)
    assert ("value_head.weight" in moved) is (critic == "head")


def test_the_reference_is_the_base_bit_for_bit_however_far_the_policy_is():
    """P16."""
    base = tiny_model("llama")
    trainer = ppo(model=deepcopy(base), max_steps=2, learning_rate=0.05, batch_size=2)
    assert isinstance(trainer.reference, AdapterOff)
    trainer.train()
    batch = collate(random_groups(), score_all=True)
    with torch.no_grad():
        expected, policy = (forward(model, batch).logprobs_N for model in (base, trainer.model))
    assert torch.equal(trainer.reference.logprobs(batch), expected)
    assert not torch.allclose(policy, expected)


def test_everything_is_as_before_after_an_exception_in_an_update():
    """P22: adapters, modes, gradients wanted, dropout; and the next update is what it would have been."""

    class Once:
        failing = True

    def fail(control: object) -> None:
        if Once.failing:
            raise KeyError("mine")

    trainer = ppo(adapter=lora(4, dropout=0.1), reference="snapshot", trained=True)
    other = ppo(adapter=lora(4, dropout=0.1), reference="snapshot", trained=True)
    trainer.add_callback(At("on_pre_optimizer_step", 0, fail))
    trainer.model.eval()
    trainer.model.get_submodule("base_model.model.lm_head").train()

    def state() -> Any:
        model = trainer.model
        return (
            [(name, module.training, getattr(module, "p", None)) for name, module in model.named_modules()],
            [(name, weight.requires_grad, weight.grad) for name, weight in model.named_parameters()],
            (model.active_adapter, model.active_adapters),
        )

    rows, before = trainer.rollout(PROMPTS), state()
    with pytest.raises(KeyError, match="mine"):
        trainer.update(rows)
    assert state() == before
    assert trainer.iteration == 0
    Once.failing = False
    trainer.update(rows)
    assert state() == before
    other.update(rows)
    assert_same_weights(trainer, other)


@pytest.mark.parametrize("critic", ["head", "adapter"])
def test_during_its_warm_up_the_critic_learns_and_the_policy_stands_still(critic):
    trainer = ppo(critic=critic, critic_warmup=2, max_steps=3, samples_per_prompt=2, minibatches=2)
    seen = [weights(trainer)]
    for step in range(1, 4):
        trainer.add_callback(At("on_step_end", step, lambda control: seen.append(weights(trainer))))
    history = trainer.train().history
    policy = [{name: value for name, value in each.items() if "lora" in name} for each in seen]
    for warming in (1, 2):
        assert all(torch.equal(value, policy[0][name]) for name, value in policy[warming].items())
    assert any(not torch.equal(value, policy[0][name]) for name, value in policy[3].items())
    assert [row["approx_kl"] > 0 for row in history] == [False, False, True]
    assert history[0]["value"] == 0.0 != history[1]["value"], "it starts at zero, and learns"


def test_sampling_and_updating_leave_the_callers_generators_alone():
    state = torch.random.get_rng_state()
    trainer = ppo()
    torch.random.set_rng_state(state)
    updated(trainer)
    assert torch.equal(torch.random.get_rng_state(), state)


# -- rewards ----------------------------------------------------------------------------------------------


def test_zero_is_a_score_and_none_is_not():
    """P20."""

    def some(prompts: Any, completions: Any) -> list[float | None]:
        return [0.0, None, 0.0, 0.0]

    trainer = ppo(reward=some, max_drop_frac=0.25)
    rows = trainer.rollout(PROMPTS)
    assert [row.score for row in rows] == [0.0] * 3
    row = trainer.update(rows)
    assert (row["dropped"], row["score"]) == (0.25, -1.0 + row["finished"])
    with pytest.raises(DataError, match="for all but 10% of the rows"):
        ppo(reward=some).rollout(PROMPTS)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ([1.0, math.nan, 1.0, 1.0], NonFiniteError),
        ([1.0, 1.0, math.inf, 1.0], NonFiniteError),
        ([1.0, 1.0, 1.0], ShapeError),
        ([torch.zeros(99), 1.0, 1.0, 1.0], ShapeError),
    ],
    ids=["nan", "infinite", "too few", "too long"],
)
def test_a_reward_that_is_none_is_refused(answer, error):
    """P20."""
    with pytest.raises(error, match="reward"):
        ppo(reward=lambda prompts, completions: answer).rollout(PROMPTS)


def test_an_exception_of_the_reward_ends_the_run_and_names_its_step():
    """P20: never a number; what was trained before stays."""

    def fails_later(prompts: Any, completions: Any, *, completion_ids: Any) -> list[float]:
        if trainer.iteration == 1:
            raise RuntimeError("judge is down")
        return by_tokens(prompts, completions, completion_ids=completion_ids)

    trainer = ppo(reward=fails_later, max_steps=3)
    with pytest.raises(RuntimeError, match="judge is down") as caught:
        trainer.train()
    assert any("step 2 of 3" in note for note in caught.value.__notes__)
    assert trainer.iteration == 1


def test_a_missing_stop_is_paid_for_in_the_loss_alone():
    """P13: the row tells the score as it counts."""
    free, dear = ppo(missing_stop_penalty=0.0), ppo(missing_stop_penalty=2.0)
    given = [[4]] * 2, [[7, 8], [7, EOS]], [1.0, 1.0]
    assert free.step(*given)["score"] == 1.0
    row = dear.step(*given)
    assert row["score"] == row["shaped_reward"] == 0.0
    assert ppo(missing_stop_score=-3.0).step([[4]], [[7, 8]], [1.0])["score"] == -3.0


def test_scores_are_scaled_by_their_running_deviation():
    trainer = ppo(scale_scores=True, missing_stop_penalty=0.0)
    first = trainer.step([[4]] * 2, [[7, EOS]] * 2, [3.0, 3.0])
    assert first["score"] == 3.0, "no deviation yet"
    second = trainer.step([[4]] * 2, [[7, EOS], [8, EOS]], [1.0, 5.0])
    assert trainer.moments.std == pytest.approx(math.sqrt(8 / 3))
    assert second["score"] == pytest.approx(3.0 / math.sqrt(8 / 3))


# -- pre-training text, the controller, what is told --------------------------------------------------------


def test_text_pulls_in_the_same_step():
    """P24: the likelihood of the text rises, and the row tells its loss."""
    text = text_rows(3)
    trainer = ppo(ptx_dataset=text, ptx_coef=1.0, learning_rate=0.01)
    losses = [updated(trainer)["loss_ptx"] for _ in range(6)]
    assert losses[-1] < losses[0]
    assert ppo().objective.ptx_coef == 0.0
    with pytest.raises(ConfigError, match=r"ptx_dataset and PPOConfig\.ptx_coef need each other"):
        ppo(ptx_dataset=text)


def test_an_adaptive_penalty_follows_the_kl_of_a_sequence():
    """P24: beta (1 + clip(K / target - 1, .2) N / horizon), N the rows of the rollout."""
    trainer = ppo(kl_target=0.5, kl_coef=0.1, kl_horizon=100, trained=True, reference="adapter_off")
    row = updated(trainer)
    error = min(max(row["kl"] / 0.5 - 1, -0.2), 0.2)
    assert error != 0
    assert trainer.kl.beta == pytest.approx(0.1 * (1 + error * 4 / 100))
    assert row["beta"] == pytest.approx(0.1), "what this rollout was shaped with"
    assert updated(trainer)["beta"] == pytest.approx(0.1 * (1 + error * 4 / 100))


def test_a_row_tells_what_the_algorithm_is_judged_by():
    row = updated(ppo(critic="adapter"))
    assert {
        "score",
        "score_std",
        "shaped_reward",
        "kl",
        "kl_k3",
        "beta",
        "entropy",
        "approx_kl",
        "clip_fraction",
        "ratio_deviation",
        "loss_policy",
        "loss_value",
        "explained_variance",
        "advantage_std",
        "return_std",
        "grad_norm",
        "grad_norm_critic",
        "completion_tokens",
        "finished",
        "dropped",
    } <= row.keys()
    assert all(math.isfinite(value) for value in row.values())


# -- refused ---------------------------------------------------------------------------------------------


def test_a_penalty_needs_a_reference():
    with pytest.raises(ConfigError, match=r"kl_coef=0\.05 needs a reference"):
        ppo(reference=None)
    assert updated(ppo(reference=None, kl_coef=0.0))["kl"] == 0.0


def test_rollouts_and_examples_are_not_confused():
    trainer = ppo()
    with pytest.raises(ShapeError, match="at least one rollout"):
        trainer.update([])
    with pytest.raises(CapabilityError, match="PPO"):
        trainer.predict(PROMPTS)
    with pytest.raises(DataError, match="expected a list of prompts"):
        trainer.rollout([])


def test_a_rollout_phase_holds_the_rows_of_all_its_minibatches():
    trainer = ppo(batch_size=6, samples_per_prompt=3, minibatches=2, data=prompts(9))
    assert trainer.examples_per_step == 6 * 2 // 3


def test_a_row_tells_the_reward_as_it_was_given():
    trainer = ppo(reward=lambda prompts, completions, **_: [25.0] * len(completions), score_clip=1.0)
    row = trainer.update(trainer.rollout(PROMPTS))
    assert row["reward"] == 25.0
    assert row["score"] <= 1.0
    assert row["rollout_tokens_per_second"] > 0
    assert row["update_tokens_per_second"] > 0


def test_samples_are_the_rows_of_the_last_update():
    trainer = ppo()
    assert trainer.samples == []
    rollouts = trainer.rollout(PROMPTS)
    trainer.update(rollouts)
    assert [row["completion"] for row in trainer.samples] == [r.completion_ids.tolist() for r in rollouts]
    assert [row["reward"] for row in trainer.samples] == [r.score for r in rollouts]
    assert all(abs(row["kl"]) < 1e-5 for row in trainer.samples)  # the policy is the reference still


def test_rewards_are_asked_for_again_and_left_out_where_the_settings_say_so():
    calls = []

    def fails_first(prompts, completions, **_):
        calls.append(len(prompts))
        if len(calls) == 1:
            raise ConnectionError("busy")
        return [1.0] * len(prompts)

    patient = ppo(reward=fails_first, reward_retries=1, reward_batch_size=2)
    assert len(patient.rollout(PROMPTS)) == 4
    assert calls == [2, 2, 2]

    def fails(prompts, completions, **_):
        raise ConnectionError("down")

    lenient = ppo(reward=fails, reward_on_error="drop", max_drop_frac=1.0)
    assert lenient.rollout(PROMPTS) == []
    with pytest.raises(ConnectionError):
        ppo(reward=fails).rollout(PROMPTS)
    with pytest.raises(ConfigError, match="reward_on_error"):
        PPOConfig(reward_on_error="zero")
