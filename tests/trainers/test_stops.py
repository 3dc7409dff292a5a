"""However a run is stopped: a valid checkpoint, handlers given back, and the resumed run is the same."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from ftlib.engine.manifest import newest_valid
from ftlib.objectives import SFT
from ftlib.trainers import snapshot
from tests.trainers.runs import CUTS, STEPS, WAYS, assert_same, run
from tests.trainers.tiny import At, rows, sft

DROPOUT = WAYS["lora dropout"] | {"max_tokens": CUTS["3"]}
SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell starts what runs in its background with SIGINT ignored; here it counts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Acting:
    """SFT that calls `act` in one forward: the `call`-th in training, or in evaluation."""

    def __init__(
        self, call: int = 0, act: Callable[[], None] = lambda: None, *, training: bool = True
    ) -> None:
        self.left, self.act, self.training = call, act, training

    def counts(self, batch):
        return SFT().counts(batch)

    def __call__(self, model, batch):
        self.left -= model.training == self.training
        if self.left == 0 and model.training == self.training:
            self.act()
        return SFT()(model, batch)


def send(number: int) -> Callable[..., None]:
    """A signal to this process; Python handles it before the next line."""
    return lambda *_: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("place", "step"),
    [("on_step_begin", 3), ("on_step_end", 1), ("on_save", 4), ("on_evaluate", 3), ("on_log", 2)],
)
def test_a_signal_between_steps(tmp_path, place, step, number, uninterrupted):
    handlers = [signal.getsignal(each) for each in SIGNALS]
    options = DROPOUT | {"save_steps": 2}
    result = run(tmp_path, callbacks=[At(place, step, send(number))], **options).result
    assert result.stopped_by == signal.Signals(number).name
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    assert newest_valid(tmp_path).manifest["step"] == result.metrics["steps"] < STEPS
    assert_same(run(tmp_path, resume=True, **options), uninterrupted("lora dropout", "3"))


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("call", [1, 4, 5, 6])
def test_a_signal_inside_a_step_gives_the_step_up(tmp_path, call, number, uninterrupted):
    result = run(tmp_path, objective=Acting(call, send(number)), **DROPOUT).result
    assert result.stopped_by == signal.Signals(number).name
    assert newest_valid(tmp_path).manifest["step"] == result.metrics["steps"] < STEPS
    assert_same(run(tmp_path, resume=True, objective=Acting(), **DROPOUT), uninterrupted("lora dropout", "3"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_inside_an_evaluation_leaves_it_to_the_resumed_run(tmp_path, number, uninterrupted):
    result = run(tmp_path, objective=Acting(1, send(number), training=False), **DROPOUT).result
    assert (result.stopped_by, result.metrics["steps"]) == (signal.Signals(number).name, 3)
    assert not any("eval_loss" in row for row in result.history)
    assert_same(run(tmp_path, resume=True, objective=Acting(), **DROPOUT), uninterrupted("lora dropout", "3"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_a_checkpoint_is_written_lets_it_be_finished(
    tmp_path, number, monkeypatch, uninterrupted
):
    write = snapshot.write
    monkeypatch.setattr(snapshot, "write", lambda *args: [send(number)(), write(*args)])
    options = DROPOUT | {"save_steps": 2}
    result = run(tmp_path, **options).result
    assert (result.stopped_by, result.metrics["steps"]) == (signal.Signals(number).name, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000002"]
    monkeypatch.undo()
    assert_same(run(tmp_path, resume=True, **options), uninterrupted("lora dropout", "3"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_raises_at_once_and_everything_is_given_back(tmp_path, number):
    handler, python = signal.getsignal(number), random.getstate()
    twice = At("on_step_end", 2, lambda control: [send(number)(), send(number)()])
    trainer = sft(output_dir=tmp_path, callbacks=[twice])
    modes = [module.training for module in trainer.model.modules()]
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        trainer.train()
    assert signal.getsignal(number) == handler
    assert random.getstate() == python
    assert [module.training for module in trainer.model.modules()] == modes
    assert not (tmp_path / "run.lock").exists()


def test_stop_may_be_called_from_another_thread():
    def elsewhere(control) -> None:
        thread = threading.Thread(target=trainer.stop)  # the trainer below
        thread.start()
        thread.join()

    trainer = sft(callbacks=[At("on_step_end", 2, elsewhere)])
    result = trainer.train()
    assert (result.stopped_by, result.metrics["steps"]) == ("stop()", 2)


def test_after_a_stop_the_trainer_evaluates_and_steps_as_before():
    trainer = sft(eval_data=rows(3), callbacks=[At("on_step_end", 1, lambda control: trainer.stop())])
    assert trainer.train().stopped_by == "stop()"
    trainer.stop()  # nothing runs: nothing is stopped
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.step(rows(2))["step"] == 2


def test_a_trainer_runs_in_a_thread_without_touching_handlers():
    handlers = [signal.getsignal(each) for each in SIGNALS]
    results = []
    thread = threading.Thread(target=lambda: results.append(sft().train()))
    thread.start()
    thread.join()
    assert [result.metrics["steps"] for result in results] == [3]
    assert [signal.getsignal(each) for each in SIGNALS] == handlers


def test_an_error_in_a_callback_propagates_with_its_place_and_gives_everything_back(tmp_path):
    handlers, python = [signal.getsignal(each) for each in SIGNALS], random.getstate()

    def fail(control) -> None:
        raise LookupError("mine")

    trainer = sft(output_dir=tmp_path, callbacks=[At("on_step_end", 2, fail)])
    modes = [module.training for module in trainer.model.modules()]
    with pytest.raises(LookupError, match="mine") as caught:
        trainer.train()
    assert caught.value.__notes__ == [
        "raised by the callback At.on_step_end at step 2",
        "in training step 3 of 3",
    ]
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    assert random.getstate() == python
    assert [module.training for module in trainer.model.modules()] == modes
    assert not (tmp_path / "run.lock").exists()


def test_the_progress_line_is_closed_after_an_error(capsys):
    def fail(control) -> None:
        raise LookupError

    trainer = sft(progress="terminal", callbacks=[At("on_step_end", 2, fail)])
    with pytest.raises(LookupError):
        trainer.train()
    assert capsys.readouterr().err.endswith("\n")
