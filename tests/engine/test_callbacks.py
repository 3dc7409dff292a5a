"""transformers' callback protocol, through a loop that is not transformers' own."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging as transformers_logging

from ftlib.engine import callbacks as callbacks_module
from ftlib.engine.callbacks import (
    EVENTS,
    CallbackDispatcher,
    greater_is_better,
    training_arguments,
    update_best,
)
from ftlib.errors import CheckpointError, ConfigError, MissingPackageError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "epochs": 2,
    "max_steps": None,
    "learning_rate": 2e-4,
    "batch_size": 8,
    "seed": 7,
    "schedule": "cosine",
    "warmup": 0.1,
    "weight_decay": 0.01,
    "betas": (0.9, 0.95),
    "eps": 1e-7,
    "max_grad_norm": 0.5,
    "optimizer": "adamw",
    "gradient_checkpointing": False,
    "log_steps": 3,
    "eval_steps": 1,
    "eval_batch_size": None,
    "save_steps": 3,
    "keep_checkpoints": 2,
    "metric_for_best": "loss",
    "load_best": True,
    "run_name": "a run",
    "report_to": (),
    "shuffle": True,
}
MODEL = torch.nn.Linear(1, 1)
TOKENIZER = object()


def dispatcher_of(*callbacks, config=CONFIG, **context) -> CallbackDispatcher:
    args = training_arguments(config, None)
    return CallbackDispatcher(callbacks, MODEL, TOKENIZER, args, TrainerState(), TrainerControl(), **context)


class Recorder(TrainerCallback):
    """Notes every event it hears of."""

    def __init__(self):
        self.heard = []

    def __getattribute__(self, name):
        if name in EVENTS:
            return lambda args, state, control, **kwargs: self.heard.append((name, kwargs))
        return super().__getattribute__(name)


# --- dispatching -----------------------------------------------------------------------------------


def test_events_are_those_of_the_protocol():
    assert {"on_init_end", "on_train_begin", "on_step_end", "on_log", "on_evaluate", "on_save"} <= EVENTS
    assert all(hasattr(CallbackHandler, event) for event in EVENTS)


@pytest.mark.parametrize("event", sorted(EVENTS))
def test_every_event_hands_over_what_transformers_does(event):
    """Compared with transformers' own handler, argument by argument."""
    extra = {"on_log": {"logs": {"loss": 1.0}}, "on_evaluate": {"metrics": {}}, "on_predict": {"metrics": {}}}
    kwargs = extra.get(event, {})
    ours, theirs = Recorder(), Recorder()
    context = {"optimizer": 1, "lr_scheduler": 2, "train_dataloader": 3, "eval_dataloader": 4}
    dispatcher = dispatcher_of(ours, **context)
    dispatcher.dispatch(event, **kwargs)
    handler = CallbackHandler([theirs], MODEL, TOKENIZER, 1, 2)
    handler.train_dataloader, handler.eval_dataloader = 3, 4
    getattr(handler, event)(dispatcher.args, dispatcher.state, TrainerControl(), **kwargs)
    assert ours.heard == theirs.heard


@pytest.mark.parametrize("event", sorted(EVENTS))
def test_every_event_answers_the_request_that_transformers_takes_as_answered(event):
    kwargs = {"metrics": {}} if event in ("on_evaluate", "on_predict") else {}
    kwargs = {"logs": {}} if event == "on_log" else kwargs
    dispatcher = dispatcher_of()
    theirs = TrainerControl(*[True] * 5)
    dispatcher.control = TrainerControl(*[True] * 5)
    getattr(CallbackHandler([], MODEL, TOKENIZER, None, None), event)(
        dispatcher.args, dispatcher.state, theirs, **kwargs
    )
    assert dispatcher.dispatch(event, **kwargs) == theirs


def test_returned_control_takes_the_place_of_the_old_one():
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            return TrainerControl(should_training_stop=True)

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = True

    dispatcher = dispatcher_of(Stop, Save())
    control = dispatcher.dispatch("on_step_end")
    assert control is dispatcher.control
    assert (control.should_training_stop, control.should_save) == (True, True)


def test_wrong_event_and_wrong_callback_are_refused():
    with pytest.raises(ConfigError, match=r"on_logg.*on_log"):
        dispatcher_of().dispatch("on_logg")
    with pytest.raises(ConfigError, match=r"expected transformers\.TrainerCallback objects, got 3"):
        dispatcher_of(3)


def test_callback_that_returns_something_else_is_named():
    class Wrong(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            return True

    with pytest.raises(TypeError, match=r"Wrong\.on_save: expected a TrainerControl or None, got True"):
        dispatcher_of(Wrong()).dispatch("on_save")


def test_callbacks_cannot_move_the_random_numbers_of_training():
    class Draws(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            random.random()
            torch.rand(3)

    dispatcher = dispatcher_of(Draws())
    torch.manual_seed(1)
    random.seed(1)
    expected = (float(torch.rand(())), random.random())
    torch.manual_seed(1)
    random.seed(1)
    dispatcher.dispatch("on_step_end")
    assert (float(torch.rand(())), random.random()) == expected


def test_users_error_passes_through_with_a_note_of_step_and_event():
    class Broken(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ZeroDivisionError("mine")

    dispatcher = dispatcher_of(Broken())
    dispatcher.state.global_step = 12
    with pytest.raises(ZeroDivisionError, match="mine") as caught:
        dispatcher.dispatch("on_step_end")
    assert caught.value.__notes__ == ["raised by the callback Broken.on_step_end at step 12"]


# --- trackers --------------------------------------------------------------------------------------


class Tracker(TrainerCallback):
    """Works once, then fails."""

    def __init__(self):
        self.calls = 0

    def on_log(self, args, state, control, **kwargs):
        self.calls += 1
        if self.calls > 1:
            raise ConnectionError("503")


@pytest.fixture
def tracker(monkeypatch):
    monkeypatch.setattr(callbacks_module, "get_reporting_integration_callbacks", lambda names: [Tracker])


def test_failing_tracker_warns_once_and_is_dropped_while_training_goes_on(tracker, caplog):
    own = Recorder()
    dispatcher = dispatcher_of(own, config=CONFIG | {"report_to": ["wandb"]})
    [_, named] = dispatcher.callbacks
    for step in range(4):
        dispatcher.state.global_step = step
        dispatcher.dispatch("on_log", logs={"loss": 1.0})
    assert named.calls == 2
    assert dispatcher.callbacks == (own,)
    assert len(own.heard) == 4
    [record] = caplog.records
    assert record.name == "ftlib.engine.callbacks"
    assert record.levelname == "WARNING"
    for part in ("'wandb'", "on_log", "step 1", "ConnectionError: 503", "report_to"):
        assert part in record.getMessage()


def test_the_same_tracker_handed_over_by_the_user_propagates():
    dispatcher = dispatcher_of(Tracker())
    dispatcher.dispatch("on_log", logs={})
    with pytest.raises(ConnectionError):
        dispatcher.dispatch("on_log", logs={})


def test_interrupt_in_a_tracker_is_not_swallowed(monkeypatch):
    class Interrupted(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    monkeypatch.setattr(callbacks_module, "get_reporting_integration_callbacks", lambda names: [Interrupted])
    dispatcher = dispatcher_of(config=CONFIG | {"report_to": "wandb"})
    with pytest.raises(KeyboardInterrupt):
        dispatcher.dispatch("on_log", logs={})


@pytest.mark.parametrize("none", [None, (), [], "none", ["none"]])
def test_every_word_for_no_tracker_means_none(none):
    dispatcher = dispatcher_of(config=CONFIG | {"report_to": none})
    assert dispatcher.args.report_to == []
    assert dispatcher.callbacks == ()


def test_unknown_tracker_and_missing_package_are_refused_before_training():
    with pytest.raises(ConfigError, match="'wandbb'"):
        dispatcher_of(config=CONFIG | {"report_to": "wandbb"})
    with pytest.raises(MissingPackageError, match=r"'swanlab'.*pip install swanlab"):
        dispatcher_of(config=CONFIG | {"report_to": "swanlab"})


# --- early stopping and the best model -------------------------------------------------------------


def fake_loop(dispatcher: CallbackDispatcher, losses: list[float]) -> int:
    """One evaluation a step; returns the steps taken."""
    state = dispatcher.state
    state.max_steps = len(losses)
    dispatcher.dispatch("on_train_begin")
    for loss in losses:
        dispatcher.dispatch("on_step_begin")
        state.global_step += 1
        dispatcher.dispatch("on_step_end")
        metrics = {"eval_loss": loss}
        dispatcher.dispatch("on_evaluate", metrics=metrics)
        update_best(dispatcher.args, state, metrics)
        if dispatcher.control.should_training_stop:
            break
    dispatcher.dispatch("on_train_end")
    return state.global_step


def test_early_stopping_of_transformers_stops_after_its_patience():
    """The best is step 2; steps 3 and 4 are worse, and the patience is two evaluations."""
    dispatcher = dispatcher_of(EarlyStoppingCallback(early_stopping_patience=2))
    assert fake_loop(dispatcher, [3.0, 2.0, 2.5, 2.4, 1.0, 0.5]) == 4
    assert (dispatcher.state.best_metric, dispatcher.state.best_global_step) == (2.0, 2)


def test_early_stopping_lets_an_improving_run_finish():
    dispatcher = dispatcher_of(EarlyStoppingCallback(early_stopping_patience=1))
    assert fake_loop(dispatcher, [3.0, 2.0, 1.0]) == 3


def test_early_stopping_remembers_its_patience_through_a_checkpoint():
    first = dispatcher_of(EarlyStoppingCallback(early_stopping_patience=2))
    fake_loop(first, [2.0, 3.0])  # one worse evaluation
    states = json.loads(json.dumps(first.states()))
    resumed = dispatcher_of(EarlyStoppingCallback(early_stopping_patience=2))
    resumed.restore_states(states)
    resumed.state.best_metric = first.state.best_metric
    assert fake_loop(resumed, [3.0, 3.0]) == 1


def test_states_go_to_callbacks_of_their_kind_in_order():
    early = [EarlyStoppingCallback(early_stopping_patience=5) for _ in range(2)]
    for count, callback in enumerate(early, start=1):
        callback.early_stopping_patience_counter = count
    states = dispatcher_of(Recorder(), *early).states()
    fresh = [EarlyStoppingCallback(early_stopping_patience=9) for _ in range(2)]
    dispatcher_of(fresh[0], Recorder(), fresh[1]).restore_states(states)
    assert [callback.early_stopping_patience_counter for callback in fresh] == [1, 2]
    assert [callback.early_stopping_patience for callback in fresh] == [9, 9]
    dispatcher_of().restore_states(states)  # callbacks that are gone are passed over


def test_state_with_an_unknown_attribute_is_refused():
    state = {"callback": "EarlyStoppingCallback", "attributes": {"on_log": 1}}
    with pytest.raises(CheckpointError, match="'on_log'"):
        dispatcher_of(EarlyStoppingCallback()).restore_states([state])


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [
        ("loss", [2.0, 1.0, 1.5], [True, True, False]),
        ("eval_loss", [2.0, 2.0], [True, False]),
        ("perplexity", [9.0, 8.0], [True, True]),
        ("accuracy", [0.1, 0.3, 0.2], [True, True, False]),
        ("loss", [math.nan, 1.0, math.nan], [False, True, False]),
    ],
)
def test_best_is_the_first_of_the_best_values(metric, values, best):
    args = training_arguments(CONFIG | {"metric_for_best": metric}, None)
    state = TrainerState()
    name = "eval_" + metric.removeprefix("eval_")
    assert [update_best(args, state, {name: value}) for value in values] == best


def test_without_a_metric_nothing_is_best():
    args = training_arguments(CONFIG | {"metric_for_best": None, "load_best": False}, None)
    assert update_best(args, TrainerState(), {"eval_loss": 1.0}) is False


def test_metric_that_is_not_there_is_refused_with_the_nearest():
    args = training_arguments(CONFIG | {"metric_for_best": "los"}, None)
    with pytest.raises(ConfigError, match=r"'eval_los'\. Did you mean 'eval_loss'"):
        update_best(args, TrainerState(), {"eval_loss": 1.0})


@pytest.mark.parametrize(
    "metric",
    [
        *("loss", "perplexity", "log_loss", "loss_weighted_nll", "loss_2", "nll", "dpo", "dpo_2"),
        *("bradley_terry", "cross_entropy", "binary_cross_entropy", "mlm"),
        *("calibration_error", "helpful.jsonl/calibration_error", "tie_rate", "kl", "dropped"),
    ],
)
def test_losses_errors_and_divergences_are_to_shrink(metric):
    assert not greater_is_better(metric)
    assert not greater_is_better(f"eval_{metric}")


@pytest.mark.parametrize(
    "metric", ["accuracy", "margin", "reward", "f1_macro", "auroc", "longer_wins_accuracy"]
)
def test_scores_are_to_grow(metric):
    assert greater_is_better(metric)
    assert greater_is_better(f"eval_{metric}")


# --- TrainingArguments -----------------------------------------------------------------------------


def test_arguments_carry_the_configuration_under_transformers_names():
    args = training_arguments(CONFIG, "out")
    assert isinstance(args, TrainingArguments)
    expected = {
        "output_dir": "out",
        "num_train_epochs": 2,
        "max_steps": -1,
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "seed": 7,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.01,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-7,
        "max_grad_norm": 0.5,
        "optim": "adamw_torch",
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "best",
        "save_total_limit": 2,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
        "load_best_model_at_end": True,
        "run_name": "a run",
        "report_to": [],
    }
    assert {name: getattr(args, name) for name in expected} == expected
    json.loads(args.to_json_string())  # what trackers write


@pytest.mark.parametrize(
    "changes",
    [
        {"save_steps": None, "eval_steps": None},
        {"save_steps": 10, "eval_steps": 4},  # no multiple of each other
        {"save_steps": 10, "eval_steps": None, "load_best": False, "metric_for_best": None},
        {"save_steps": None, "eval_steps": 5, "metric_for_best": None},
        {"schedule": lambda step: 1.0, "optimizer": torch.optim.SGD},
        {"max_steps": 5, "epochs": None, "gradient_checkpointing": True, "eval_batch_size": 2},
        {"batch_size": 1, "warmup": 10},
    ],
)
def test_every_configuration_of_ours_passes_transformers_checks(changes):
    args = training_arguments(CONFIG | changes, None)
    assert args.output_dir is None
    assert args.save_steps == (CONFIG | changes).get("save_steps") or args.save_strategy != "steps"


def test_unresolved_learning_rate_is_refused():
    with pytest.raises(ConfigError, match="learning_rate"):
        training_arguments(CONFIG | {"learning_rate": None}, None)


def test_tracker_names_are_kept_for_callbacks_to_read():
    assert training_arguments(CONFIG | {"report_to": ("wandb", "trackio")}, None).report_to == [
        "wandb",
        "trackio",
    ]


GUEST = """
import json, logging, os, sys, warnings
import torch, transformers, accelerate
from transformers import TrainingArguments
from tests.engine.test_callbacks import CONFIG, training_arguments
from accelerate import Accelerator

def snapshot():
    return dict(
        environ=dict(os.environ), cwd=os.getcwd(), files=sorted(os.listdir()), path=list(sys.path),
        root=(logging.getLogger().level, list(logging.getLogger().handlers)),
        transformers=(transformers.logging.get_verbosity(), list(logging.getLogger("transformers").handlers)),
        filters=list(warnings.filters), threads=torch.get_num_threads(), default=torch.get_default_dtype(),
        distributed=torch.distributed.is_initialized(), cuda=torch.cuda.is_initialized(),
        random=torch.get_rng_state().tolist(),
    )

accelerator = Accelerator()
before, state = snapshot(), dict(accelerate.state.AcceleratorState._shared_state)
training_arguments(CONFIG, None)
training_arguments(CONFIG, "out")
after = snapshot()
changed = [key for key in before if before[key] != after[key]]
print(json.dumps(changed))
assert dict(accelerate.state.AcceleratorState._shared_state) == state
print(accelerator.device, accelerator.num_processes)
"""


def test_building_arguments_changes_nothing_around_them(tmp_path):
    """Nor the state of an Accelerator that was there: TrainingArguments by itself resets it."""
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", GUEST], capture_output=True, text=True, cwd=tmp_path, env=environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "[]"
    assert list(tmp_path.iterdir()) == []


def test_early_stopping_says_nothing_unasked(caplog):
    transformers_logging.enable_propagation()
    try:
        fake_loop(dispatcher_of(EarlyStoppingCallback()), [1.0])
    finally:
        transformers_logging.disable_propagation()
    assert caplog.records == []
