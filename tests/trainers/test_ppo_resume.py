"""PPO stopped and resumed is PPO uninterrupted, bit for bit, inside an update too (P18)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlib.errors import CheckpointError
from ftlib.models.references import FrozenCopy, Snapshot
from ftlib.trainers import PPOTrainer, TrainResult, snapshot
from ftlib.trainers.ppo_phase import Phase
from tests.models.policies import train as move
from tests.trainers.ppo_tiny import by_tokens, ppo, prompts, weights
from tests.trainers.tiny import At, without_clock
from tests.trainers.tiny import rows as text_rows

UPDATES = 5
# an adapter that has learnt something, so the reference is a snapshot; three epochs of unequal phases
OPTIONS: dict[str, Any] = {
    "data": prompts(5),
    "trained": True,
    "max_steps": UPDATES,
    "samples_per_prompt": 2,
    "minibatches": 2,
    "learning_rate": 1e-2,
    "log_steps": 2,
    "kl_target": 0.5,
    "kl_horizon": 50,
    "scale_scores": True,
    "temperature": 0.8,
}
WAYS: dict[str, dict[str, Any]] = {
    "head": {},
    "critic of its own": {"critic": "adapter", "critic_warmup": 2},
    "head warming up": {"critic_warmup": 2},
    "all weights": {"adapter": None, "trained": False, "learning_rate": 1e-3},
    "a deep copy as reference": {"reference": "copy"},
    "pre-training text": {"ptx_dataset": text_rows(3), "ptx_coef": 0.5, "temperature": 1.0},
}


def state_of(trainer: PPOTrainer) -> dict[str, Any]:
    """Everything that decides how a run goes on."""
    found: dict[str, Any] = {f"policy/{name}": value for name, value in weights(trainer).items()}
    for part, owner in trainer.stateful_parts().items():
        found |= {f"{part}/{name}": value for name, value in owner.state_dict().items()}
    for name, weight in trainer.engine.masters.named.items():
        moments = trainer.engine.optimizer.state.get(weight, {})
        found |= {f"optimizer/{name}/{each}": value for each, value in moments.items()}
    return found | {"schedule": trainer.engine.schedule.state_dict()}


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value
        assert same, name


def stop_at(step: int) -> At:
    return At("on_step_end", step, lambda control: setattr(control, "should_training_stop", True))


def run(folder: Path | None, *, resume: bool = False, **options: Any) -> tuple[PPOTrainer, TrainResult]:
    trainer = ppo(output_dir=folder, **(OPTIONS | options))
    return trainer, trainer.train(resume=resume)


@pytest.mark.parametrize("way", WAYS)
def test_stopped_at_every_update_and_continued_is_the_same_run(tmp_path, way):
    """One trainer after the other; each was made with other weights than the run has by now."""
    expected, whole = run(None, **WAYS[way])
    for step in range(1, UPDATES):
        _, result = run(tmp_path, resume=True, callbacks=[stop_at(step)], **WAYS[way])
        assert (result.stopped_by, result.metrics["steps"]) == ("callback", step)
    found = ppo(output_dir=tmp_path, **(OPTIONS | WAYS[way]))
    move(found.model)
    resumed = found.train(resume=True)
    assert without_clock(resumed.history) == without_clock(whole.history)
    assert_same_state(state_of(found), state_of(expected))


def test_what_is_compared_did_move():
    """The control: without any of these parts, the comparison above would prove little."""
    trainer, _ = run(None, **WAYS["critic of its own"])
    other = ppo(**(OPTIONS | WAYS["critic of its own"]))
    ours, theirs = state_of(trainer), state_of(other)
    for name in ("kl/beta", "moments/count", "health/first_length"):
        assert ours[name] != theirs[name], name
    for part in ("policy/", "critic/weights/"):
        moved = [
            name
            for name, value in ours.items()
            if name.startswith(part) and not torch.equal(value, theirs[name])
        ]
        assert moved, part
    assert isinstance(trainer.reference, Snapshot)
    assert isinstance(ppo(**OPTIONS, reference="copy").reference, FrozenCopy)


@pytest.mark.parametrize("part", ["kl", "moments", "reference"])
def test_without_one_part_the_resumed_run_differs(tmp_path, monkeypatch, part):
    """The negative control."""
    expected, _ = run(None)
    run(tmp_path, callbacks=[stop_at(3)])
    model = ppo(**OPTIONS).model
    move(model)  # the trainer's reference, made of it, is another one
    found = ppo(output_dir=tmp_path, model=model, **(OPTIONS | {"adapter": None, "trained": False}))
    parts = found.stateful_parts
    monkeypatch.setattr(
        found.checkpoints,
        "_parts",
        lambda: {name: owner for name, owner in parts().items() if name != part},
    )
    found.train(resume=True)
    ours, theirs = weights(found), weights(expected)
    assert not all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_stopped_in_memory_and_trained_again_is_the_same_run():
    expected, _ = run(None)
    trainer = ppo(**OPTIONS)
    for step in range(1, UPDATES):
        trainer.add_callback(At("on_step_end", step, lambda control: trainer.stop()))
    assert [trainer.train().stopped_by for _ in range(1, UPDATES)] == ["stop()"] * (UPDATES - 1)
    trainer.train()
    assert_same_state(state_of(trainer), state_of(expected))


def stopped_after(trainer: PPOTrainer, minibatches: int) -> TrainResult:
    """Train on, and stop after so many minibatches, all in one update or over several."""
    step, made = trainer._step, []

    def counted(rows: Any) -> Any:
        made.append(step(rows))
        if len(made) == minibatches:
            trainer.stop()
        return made[-1]

    trainer._step = counted  # type: ignore[method-assign]
    return trainer.train(resume=trainer.config.output_dir is not None)


@pytest.mark.parametrize("way", ["head", "critic of its own", "pre-training text"])
def test_stopped_at_every_optimiser_step_and_continued_is_the_same_run(tmp_path, way):
    """F3, P18: no prompt is completed twice, no reward asked for twice, of rollouts that are kept."""
    asked: list[int] = []

    def counted(prompts: Any, completions: Any, *, completion_ids: list[list[int]]) -> list[float]:
        asked.append(len(completions))
        return by_tokens(prompts, completions, completion_ids=completion_ids)

    options = {"max_steps": 3, "critic_warmup": 1, "reward": counted} | WAYS[way]
    expected, whole = run(None, **options)
    once, stops = list(asked), 0
    asked.clear()
    while True:
        trainer = ppo(output_dir=tmp_path, **(OPTIONS | options))
        if stops:  # from then on, its weights are those of the checkpoint
            move(trainer.model)
        result = stopped_after(trainer, 1)
        if result.stopped_by is None:
            break
        stops += 1
    assert stops >= 3 * 4 - 1  # two epochs of two minibatches in each of three updates
    assert asked == once
    assert without_clock(result.history) == without_clock(whole.history)
    assert_same_state(state_of(trainer), state_of(expected))


def test_stopped_inside_updates_in_memory_and_trained_again_is_the_same_run():
    expected, whole = run(None)
    trainer = ppo(**OPTIONS)
    result = stopped_after(trainer, 3)
    assert (result.stopped_by, result.metrics["steps"]) == ("stop()", 0)
    result = trainer.train()
    assert without_clock(result.history) == without_clock(whole.history)
    assert_same_state(state_of(trainer), state_of(expected))


def test_a_cut_update_is_resumed_from_its_rollouts_and_no_others(tmp_path):
    """The negative control: without the kept rows, or with another score, it is another run."""
    expected, _ = run(None)
    stopped_after(ppo(output_dir=tmp_path, **OPTIONS), 3)
    [folder] = tmp_path.glob("checkpoint-*")
    phase = Phase.read(folder)
    assert phase is not None
    assert (len(phase.moved), len(phase.rollouts)) == (3, 8)

    def resumed(rollouts: list[Any] | None) -> dict[str, torch.Tensor]:
        trainer = ppo(**OPTIONS)
        boundary = trainer.checkpoints.resume(folder, ())
        assert boundary is not None
        trainer.checkpoints.resume = lambda which, changes: boundary  # type: ignore[method-assign]
        boundary.phase = None if rollouts is None else Phase(rollouts, phase.told, phase.moved)
        trainer.train(resume=folder)
        return weights(trainer)

    ours = weights(expected)
    other = [replace(phase.rollouts[0], score=-1.0), *phase.rollouts[1:]]
    for rollouts, same in ((phase.rollouts, True), (None, False), (other, False)):
        found = resumed(rollouts)
        assert all(torch.equal(found[name], value) for name, value in ours.items()) is same


def test_what_callbacks_ask_for_in_an_update_that_is_cut_is_done_at_its_end(tmp_path):
    def asking(trainer: PPOTrainer) -> PPOTrainer:
        def ask(control: Any) -> None:
            control.should_evaluate = control.should_log = control.should_epoch_stop = True

        trainer.add_callback(At("on_optimizer_step", 1, ask))
        return trainer

    options = OPTIONS | {"eval_prompts": prompts(2), "log_steps": 10}
    whole = asking(ppo(**options)).train()
    assert any("eval_loss" in row for row in whole.history)  # the control
    stopped_after(asking(ppo(output_dir=tmp_path, **options)), 6)
    found = ppo(output_dir=tmp_path, **options).train(resume=True)
    assert without_clock(found.history) == without_clock(whole.history)


def test_rollouts_of_other_settings_are_left_out_and_that_is_told(tmp_path, caplog):
    stopped_after(ppo(output_dir=tmp_path, **OPTIONS), 3)
    [folder] = tmp_path.glob("checkpoint-*")
    trainer = ppo(**(OPTIONS | {"temperature": 0.9}))
    with caplog.at_level("WARNING"):
        trainer.train(resume=folder, allow_changes=["temperature", "objective.temperature"])
    assert "the settings of sampling changed" in caplog.text


def test_a_checkpoint_inside_an_update_holds_its_rollouts_bit_for_bit(tmp_path):
    trainer = ppo(**OPTIONS)
    stopped_after(trainer, 2)
    phase = trainer.boundary.phase
    assert phase is not None
    phase.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"rollouts.safetensors", "rollouts.json"}
    found = Phase.read(tmp_path)
    assert found is not None
    for ours, theirs in zip(phase.rollouts, found.rollouts, strict=True):
        for name, value in vars(ours).items():
            other = getattr(theirs, name)
            same = torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value
            assert same, name


def test_a_stop_while_sampling_leaves_the_rollout_to_the_next_run(tmp_path):
    expected, _ = run(None)
    trainer = ppo(output_dir=tmp_path, **OPTIONS)
    trainer.add_callback(At("on_step_begin", 2, lambda control: trainer.stop()))
    result = trainer.train()
    assert (result.stopped_by, result.metrics["steps"]) == ("stop()", 2)
    resumed, _ = run(tmp_path, resume=True)
    assert_same_state(state_of(resumed), state_of(expected))


@pytest.mark.parametrize("stored", [True, False], ids=["in a checkpoint", "in memory"])
def test_the_best_evaluation_has_its_critic_too(tmp_path, stored):
    """Scores fall from the second update on, so that one is the best of four."""
    seen: list[PPOTrainer] = []
    best: dict[str, torch.Tensor] = {}

    def highest_at_two(prompts: Any, completions: Any, *, completion_ids: list[list[int]]) -> list[float]:
        away = abs(seen[0].iteration - 2) if seen else 0
        return [score - 10 * away for score in by_tokens(prompts, completions, completion_ids=completion_ids)]

    def trained() -> dict[str, torch.Tensor]:
        assert seen[0].critic is not None
        critic = {f"critic/{name}": weight for name, weight in seen[0].critic.weights().items()}
        return weights(seen[0]) | critic

    options = OPTIONS | {"scale_scores": False, "kl_target": None, "kl_horizon": 10_000.0}
    trainer = ppo(
        reward=highest_at_two,
        eval_prompts=prompts(2),
        critic="adapter",
        output_dir=tmp_path if stored else None,
        callbacks=[At("on_evaluate", 2, lambda control: best.update(trained()))],
        **(options | {"max_steps": 4, "eval_steps": 1, "load_best": True}),
    )
    seen.append(trainer)
    at_last: dict[str, torch.Tensor] = {}
    trainer.add_callback(At("on_step_end", 4, lambda control: at_last.update(trained())))
    result = trainer.train()
    assert result.metrics["best_step"] == 2
    found = trained()
    for name, weight in best.items():
        assert torch.equal(found[name], weight), name
    moved = {name.split("/")[0] for name in best if not torch.equal(at_last[name], best[name])}
    assert "critic" in moved  # the control: both went on after their best
    assert len(moved) > 1


def test_other_settings_are_refused(tmp_path):
    run(tmp_path, callbacks=[stop_at(2)])
    with pytest.raises(CheckpointError, match="kl_target"):
        ppo(**(OPTIONS | {"kl_target": 0.7})).train(resume=tmp_path / "checkpoint-00000002")


def test_a_checkpoint_between_two_updates_holds_no_rollouts(tmp_path):
    """It is that of a boundary: weights, moments, parts and counters."""
    run(tmp_path, callbacks=[stop_at(1)])
    [folder] = tmp_path.glob("checkpoint-*")
    assert {path.name for path in folder.iterdir()} >= {"parts.safetensors", "train_state.safetensors"}
    assert not list(folder.glob("rollouts.*"))
    parts = snapshot.load_state(folder / "state.json")["parts"]
    assert parts.keys() == {"reference", "kl", "moments", "health"}
