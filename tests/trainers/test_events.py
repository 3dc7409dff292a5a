"""Callbacks hear what transformers' own Trainer tells them, in its order; and may end an epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from ftlib.engine.callbacks import EVENTS
from ftlib.engine.files import load_state, save_state
from ftlib.errors import ConfigError
from tests.models_zoo import tiny_model
from tests.trainers.processes import ranks, start
from tests.trainers.runs import assert_same, run
from tests.trainers.tiny import At, rows, sft, trained

EPOCHS, STEPS_PER_EPOCH, BATCH = 2, 3, 2
DATA, EVAL = rows(BATCH * STEPS_PER_EPOCH), rows(BATCH, seed=1)
PLAN = {"epochs": EPOCHS, "batch_size": BATCH, "log_steps": 1, "eval_steps": 2, "save_steps": 2}
SUMMARY = "train_runtime"  # transformers' last row, here in `TrainResult.metrics`
PLAN_ALONE = {"epochs": EPOCHS, "batch_size": BATCH, "log_steps": 1}
# A micro-batch is a matter of memory here; evaluation has none of its own steps either.
NOT_TOLD = {"on_substep_end", "on_prediction_step", "on_predict", "on_push_begin"}


class Told(TrainerCallback):
    """Notes every event, the step it came at, and what the log's last row holds."""

    def __init__(self) -> None:
        self.events: list[list[Any]] = []

    def __getattribute__(self, name: str) -> Any:
        return super().__getattribute__("hear")(name) if name in EVENTS else super().__getattribute__(name)

    def hear(self, event: str) -> Callable[..., None]:
        def method(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            last = state.log_history[-1] if state.log_history else {}
            kinds = [name for name in ("loss", "eval_loss", SUMMARY) if name in last]
            self.events.append([event, state.global_step, *kinds])

        return method


def setting(switch: str, step: int, event: str) -> At:
    return At(event, step, lambda control: setattr(control, switch, True))


ASKING: dict[str, Callable[[], list[TrainerCallback]]] = {
    "nothing": list,
    "a log and an evaluation at an epoch's end": lambda: [
        setting("should_log", STEPS_PER_EPOCH, "on_epoch_end"),
        setting("should_evaluate", STEPS_PER_EPOCH, "on_epoch_end"),
    ],
    "the first epoch to end": lambda: [setting("should_epoch_stop", 1, "on_step_end")],
    "both epochs to end, the last one before its update": lambda: [
        setting("should_epoch_stop", 2, "on_log"),
        setting("should_epoch_stop", 3, "on_pre_optimizer_step"),
    ],
}


class Zipped(torch.utils.data.Dataset):
    """Rows as transformers' default collator takes them: here all of one length."""

    def __init__(self, data: list[dict[str, Any]]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self.data[index]["prefix_ids"][:2] + self.data[index]["continuation_ids"][0][:3]
        return {"input_ids": ids, "labels": ids}


def train_with_transformers(folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    for index, (name, callbacks) in enumerate(ASKING.items()):
        told = Told()
        arguments = TrainingArguments(
            output_dir=str(folder / f"run-{index}"),
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=BATCH,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        model = tiny_model("llama")
        trainer = Trainer(
            model,
            arguments,
            train_dataset=Zipped(DATA),
            eval_dataset=Zipped(EVAL),
            callbacks=[told, *callbacks()],
        )
        trainer.train()
        save_state(folder / f"{name}.json", {"events": told.events})


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> dict[str, list[list[Any]]]:
    folder = tmp_path_factory.mktemp("transformers")
    process = start(train_with_transformers, folder, errors=folder / "errors")
    process.join(timeout=240)
    assert process.exitcode == 0, (folder / "errors").read_text() if (folder / "errors").exists() else "hung"
    return {name: load_state(folder / f"{name}.json")["events"] for name in ASKING}


@pytest.mark.oracle
@pytest.mark.parametrize("name", ASKING)
def test_events_and_their_order_are_those_of_transformers(tmp_path, name, theirs):
    told = Told()
    sft(data=DATA, eval_data=EVAL, output_dir=tmp_path, callbacks=[told, *ASKING[name]()], **PLAN).train()
    expected = [event for event in theirs[name] if event[0] not in NOT_TOLD]
    *expected, summary, end = expected
    assert summary == ["on_log", end[1], SUMMARY]
    assert told.events == [*expected, [*end[:2], *told.events[-1][2:]]]


def gradients(trainer) -> list[torch.Tensor]:
    return [
        weight.grad.clone() for weight in trainer.engine.masters.named.values() if weight.grad is not None
    ]


def test_gradients_are_clipped_before_the_update_and_there_after_it():
    seen: dict[str, Any] = {}

    def look(event: str) -> At:
        return At(event, 0, lambda control: seen.update({event: (gradients(trainer), trained(trainer))}))

    names = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step")
    trainer = sft(data=DATA, max_steps=1, max_grad_norm=0.01, callbacks=[look(name) for name in names])
    trainer.train()
    (none, start_), (before, unmoved), (after, moved) = (seen[name] for name in names)
    assert none == []
    assert len(before) == len(after) > 0
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    norm = torch.stack([gradient.norm() for gradient in before]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.01), rtol=1e-4, atol=0)
    assert all(torch.equal(unmoved[name], value) for name, value in start_.items())
    assert not any(torch.equal(moved[name], value) for name, value in start_.items())


def test_a_step_left_out_has_no_update_to_tell_of():
    told = Told()
    trainer = sft(data=DATA, max_steps=1, on_nonfinite="skip", callbacks=[told])
    trainer.engine.scorer.register_forward_hook(
        lambda module, args, scored: replace(scored, logprobs_N=scored.logprobs_N * float("nan"))
    )
    trainer.train()
    events = [event for event, *_ in told.events]
    assert "on_step_end" in events
    assert not {"on_pre_optimizer_step", "on_optimizer_step"} & set(events)


def test_an_epoch_that_ends_early_leaves_the_rest_of_its_examples_out():
    sources: list[list[str]] = []
    trainer = sft(data=DATA, callbacks=[setting("should_epoch_stop", 1, "on_step_end")], **PLAN_ALONE)
    take = trainer.sampler.next_batch
    trainer.sampler.next_batch = lambda: [sources.append(indices := take()), indices][1]
    result = trainer.train()
    first, second = trainer.sampler.order(0), trainer.sampler.order(1)
    assert sources == [first[:2], second[:2], second[2:4], second[4:]]
    assert result.stopped_by is None
    assert [row["epoch"] for row in result.history] == pytest.approx([1 / 3, 1 + 1 / 3, 1 + 2 / 3, 2])


def test_the_last_epoch_ending_early_is_logged_and_evaluated_once():
    ending = At("on_step_end", 4, lambda control: setattr(control, "should_epoch_stop", True))
    for every in (1, 100):
        plan = {"epochs": EPOCHS, "batch_size": BATCH, "log_steps": every, "eval_steps": every}
        result = sft(data=DATA, eval_data=EVAL, callbacks=[ending], **plan).train()
        assert result.metrics["steps"] == 4
        assert [["loss" in row, "eval_loss" in row] for row in result.history if row["step"] == 4] == [
            [True, False],
            [False, True],
        ]


def test_a_number_of_steps_is_reached_however_many_epochs_end_early():
    class EveryEpoch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = True

    trainer = sft(data=DATA, max_steps=5, batch_size=BATCH, callbacks=[EveryEpoch])
    assert trainer.train().metrics["steps"] == 5
    assert trainer.sampler.state_dict() == {"epoch": 5, "offset": 0}


@pytest.mark.parametrize("asked", ["on_step_end", "on_log"])
@pytest.mark.parametrize("died", ["on_save", "on_epoch_end"])
def test_a_run_that_died_at_an_epochs_end_owes_it_to_the_resumed_one(tmp_path, asked, died):
    """The first epoch ends early after step 1, the second on its own; both at a checkpoint."""

    def asking() -> list[TrainerCallback]:
        evaluation = [setting("should_evaluate", step, "on_epoch_end") for step in (1, 4)]
        return [setting("should_epoch_stop", 1, asked), *evaluation]

    def die(control: Any) -> None:
        raise ConnectionError

    options = {
        "data": DATA,
        "eval_data": EVAL,
        "batch_size": BATCH,
        "adapter": "lora dropout",
        "eval_steps": None,
    }
    expected = run(None, callbacks=asking(), **options, log_steps=1)
    options |= {"save_steps": 1, "keep_checkpoints": 10, "log_steps": 1}
    for step in (1, 4):
        with pytest.raises(ConnectionError):
            run(tmp_path, resume=True, callbacks=[*asking(), At(died, step, die)], **options)
        assert len(list(tmp_path.glob(f"checkpoint-{step:08d}*"))) == 1
    found = run(tmp_path, resume=True, callbacks=asking(), **options)
    assert_same(found, expected)
    assert [row["step"] for row in found.result.history if "eval_loss" in row] == [1, 4]


def end_epoch_from_second_rank(rank: int, folder: Path) -> None:
    callbacks = [setting("should_epoch_stop", 1, "on_step_end")] if rank == 1 else []
    trainer = sft(data=DATA, callbacks=callbacks, **PLAN_ALONE)
    save_state(folder / f"{rank}.json", {"steps": trainer.train().metrics["steps"]})


def test_an_epoch_ended_on_one_rank_ends_on_both(tmp_path):
    ranks(end_epoch_from_second_rank, tmp_path, folder=tmp_path)
    assert [load_state(tmp_path / f"{rank}.json")["steps"] for rank in range(2)] == [4, 4]


def test_a_boundary_is_saved_once_whoever_asks(tmp_path):
    callbacks = [setting("should_save", 2, "on_step_end"), setting("should_save", 3, "on_epoch_end")]
    sft(data=DATA, batch_size=BATCH, save_steps=3, output_dir=tmp_path, callbacks=callbacks).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000002", "checkpoint-00000003"]


def test_one_callback_in_place_of_a_list_is_refused():
    with pytest.raises(ConfigError, match=r"expected a list of callbacks, got .*\[callback\]"):
        sft(callbacks=Told())
