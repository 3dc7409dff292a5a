"""transformers' callback protocol for loops of our own: who is called, with what, and what their errors do.

Follows `transformers.trainer_callback.CallbackHandler`, with three differences: callbacks cannot move the
random numbers of training, an error of a user's callback says where it came from, and a tracker named in
``report_to`` that fails is dropped with one warning. A callback that does not override an event's method
costs nothing at that event.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, final

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ftlib.engine.determinism import forked_rng
from ftlib.errors import CheckpointError, ConfigError, MissingPackageError

__all__ = ["EVENTS", "CallbackDispatcher", "greater_is_better", "training_arguments", "update_best"]

logger = logging.getLogger(__name__)

EVENTS = frozenset(name for name in vars(TrainerCallback) if name.startswith("on_"))
_SWITCHED_OFF = {  # the request that an event answers
    "on_train_begin": ("should_training_stop",),
    "on_epoch_begin": ("should_epoch_stop",),
    "on_step_begin": ("should_log", "should_evaluate", "should_save"),
    "on_evaluate": ("should_evaluate",),
    "on_save": ("should_save",),
    "on_log": ("should_log",),
}
# By the end of their names: losses with the terms that objectives make of them, errors, and counts of faults.
_LOWER_IS_BETTER = (
    *("loss", "nll", "dpo", "bradley_terry", "cross_entropy", "mlm"),
    *("perplexity", "error", "error_rate", "brier", "kl", "tie_rate", "dropped"),
)
# TrainingArguments' name -> ours, where a value passes as it is
_SAME_VALUE = {
    "num_train_epochs": "epochs",
    "learning_rate": "learning_rate",
    "seed": "seed",
    "warmup_steps": "warmup",
    "weight_decay": "weight_decay",
    "adam_epsilon": "eps",
    "max_grad_norm": "max_grad_norm",
    "activation_checkpointing": "gradient_checkpointing",
    "logging_steps": "log_steps",
    "eval_steps": "eval_steps",
    "save_total_limit": "keep_checkpoints",
    "metric_for_best_model": "metric_for_best",
    "load_best_model_at_end": "load_best",
    "run_name": "run_name",
}


@final
class CallbackDispatcher:
    """Calls callbacks in order: the given ones, then the trackers that ``args.report_to`` names.

    Args:
        callbacks: `TrainerCallback` objects, or classes to make them from.
        model: handed to every callback, as are the following.
        tokenizer: as ``processing_class``, transformers' name for it.
        args: from `training_arguments`.
        state: kept up to date by the loop.
        control: the switches callbacks set; `control` of the dispatcher is the present one.
        context: optimizer, lr_scheduler, train_dataloader, eval_dataloader; None where absent.

    Raises:
        ConfigError: something that is no callback, or an unknown tracker.
        MissingPackageError: a tracker whose package is not installed.
    """

    def __init__(
        self,
        callbacks: Iterable[TrainerCallback | type[TrainerCallback]],
        model: torch.nn.Module,
        tokenizer: Any,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **context: Any,
    ) -> None:
        self.args = args
        self.state = state
        self.control = control
        self._handed: dict[str, Any] = {"model": model, "processing_class": tokenizer}
        self._handed |= dict.fromkeys(("optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"))
        self._handed |= context
        self._callbacks: list[TrainerCallback] = []
        for callback in callbacks:
            self.add(callback)
        self._trackers = {name: _tracker(name) for name in _tracker_names(args.report_to)}

    @property
    def callbacks(self) -> tuple[TrainerCallback, ...]:
        """Those still called, in order."""
        return (*self._callbacks, *self._trackers.values())

    def add(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Call this one too, after the others that were given."""
        made = callback() if isinstance(callback, type) else callback
        if not isinstance(made, TrainerCallback):
            raise ConfigError(
                f"callbacks: expected transformers.TrainerCallback objects, got {made!r:.80}. Subclass it."
            )
        self._callbacks.append(made)

    def dispatch(self, event: str, **kwargs: Any) -> TrainerControl:
        """Tell every callback of an event.

        Args:
            event: a method of `TrainerCallback`, such as ``"on_log"``.
            kwargs: what the event carries: ``logs`` of on_log, ``metrics`` of on_evaluate.

        Returns:
            The control switches as the callbacks left them.

        Raises:
            ConfigError: no such event.
            Exception: whatever a callback raised, with a note naming callback, event and step.
        """
        if event not in EVENTS:
            near = difflib.get_close_matches(event, EVENTS, n=1)
            raise ConfigError(f"event: expected one of {sorted(EVENTS)}, got {event!r}. Did you mean {near}?")
        for switch in _SWITCHED_OFF.get(event, ()):
            setattr(self.control, switch, False)
        callbacks = [callback for callback in self._callbacks if _hears(callback, event)]
        trackers = [(name, each) for name, each in self._trackers.items() if _hears(each, event)]
        if not callbacks and not trackers:
            return self.control
        with forked_rng():
            for callback in callbacks:
                try:
                    self._call(callback, event, kwargs)
                except Exception as error:
                    where = f"{type(callback).__name__}.{event} at step {self.state.global_step}"
                    error.add_note(f"raised by the callback {where}")
                    raise
            for name, tracker in trackers:
                try:
                    self._call(tracker, event, kwargs)
                except Exception as error:  # noqa: BLE001  a tracker of any library may raise anything
                    del self._trackers[name]
                    logger.warning(
                        "tracker %r failed in %s at step %d and is no longer used; training goes on. "
                        "Leave it out of report_to to silence this. %s: %s",
                        name,
                        event,
                        self.state.global_step,
                        type(error).__name__,
                        error,
                    )
        return self.control

    def states(self) -> list[dict[str, Any]]:
        """What callbacks that can be saved want to remember, as plain values for a checkpoint."""
        return [
            {"callback": type(callback).__name__, "attributes": callback.state()["attributes"]}
            for callback in self._callbacks
            if isinstance(callback, ExportableState)
        ]

    def restore_states(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Give callbacks their memory back. Arguments they were made with now stay.

        Args:
            states: from `states`; those of callbacks that are no longer there are passed over.

        Raises:
            CheckpointError: an attribute that the callback does not have.
        """
        waiting = [callback for callback in self._callbacks if isinstance(callback, ExportableState)]
        for entry in states:
            found = next((each for each in waiting if type(each).__name__ == entry["callback"]), None)
            if found is None:
                logger.info("the checkpoint remembers %s, which this run does not use", entry["callback"])
                continue
            waiting.remove(found)
            for name, value in entry["attributes"].items():
                if name not in found.state()["attributes"]:
                    raise CheckpointError(f"callback {entry['callback']}: got an unknown attribute {name!r}.")
                setattr(found, name, value)

    def _call(self, callback: TrainerCallback, event: str, kwargs: Mapping[str, Any]) -> None:
        answer = getattr(callback, event)(self.args, self.state, self.control, **{**self._handed, **kwargs})
        if answer is None:
            return
        if not isinstance(answer, TrainerControl):
            raise TypeError(
                f"{type(callback).__name__}.{event}: expected a TrainerControl or None, got {answer!r:.80}"
            )
        self.control = answer


def _hears(callback: TrainerCallback, event: str) -> bool:
    """Whether its method is another than the one of `TrainerCallback`, which does nothing."""
    method = getattr(callback, event)
    return getattr(method, "__func__", None) is not getattr(TrainerCallback, event)


def greater_is_better(metric: str) -> bool:
    """Whether a metric of this name is to grow; losses and their terms, errors and divergences are to shrink.

    Example:
        >>> greater_is_better("eval_accuracy"), greater_is_better("eval_calibration_error")
        (True, False)
    """
    name = metric.removeprefix("eval_")
    without_place = re.sub(r"_\d+$", "", name)  # of a member of `objectives.weighted`: "dpo_2"
    return not (name.startswith("loss_") or without_place.endswith(_LOWER_IS_BETTER))


def update_best(args: TrainingArguments, state: TrainerState, metrics: Mapping[str, float]) -> bool:
    """Record an evaluation in ``state.best_metric`` and ``best_global_step`` if it is the best so far.

    Call it after dispatching on_evaluate: `EarlyStoppingCallback` compares with the best *before*.

    Args:
        args: whose metric_for_best_model and greater_is_better decide; without a metric nothing is best.
        state: whose best metric is compared and set.
        metrics: of the evaluation, names starting with ``eval_``.

    Returns:
        Whether it is the best so far; NaN never is.

    Raises:
        ConfigError: the evaluation has no such metric.
    """
    if args.metric_for_best_model is None:
        return False
    name = "eval_" + args.metric_for_best_model.removeprefix("eval_")
    if name not in metrics:
        near = difflib.get_close_matches(name, metrics, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are {sorted(metrics)}."
        raise ConfigError(f"metric_for_best: expected a metric of the evaluation, got {name!r}. {hint}")
    value, best = float(metrics[name]), state.best_metric
    if math.isnan(value) or (
        best is not None and not (value > best if args.greater_is_better else value < best)
    ):
        return False
    state.best_metric, state.best_global_step = value, state.global_step
    return True


def training_arguments(config: Mapping[str, Any], output_dir: str | Path | None) -> TrainingArguments:
    """A real `TrainingArguments`, for callbacks that read one. Nothing of ours does.

    Nothing is written, no environment variable or logger changes, and accelerate's shared state is kept;
    where there is none yet it is made, exactly as ``accelerate.Accelerator()`` would.

    Args:
        config: fields of the run's configuration by name, resolved (a number for learning_rate); names
            that TrainingArguments has no word for are left out. Callables for optimizer and schedule
            leave its default.
        output_dir: stays None when it is None.

    Raises:
        ConfigError: learning_rate is not resolved.
    """
    if config.get("learning_rate") is None:
        raise ConfigError("learning_rate: expected a number here, got None. Resolve the default first.")
    accelerate = PartialState()
    steps = config.get("max_steps")
    batch, world = config.get("batch_size", 1), accelerate.num_processes
    fields = {theirs: config[ours] for theirs, ours in _SAME_VALUE.items() if config.get(ours) is not None}
    fields |= {
        "output_dir": None if output_dir is None else str(output_dir),
        "max_steps": -1 if steps is None else steps,
        "per_device_train_batch_size": max(1, batch // world),
        "per_device_eval_batch_size": config.get("eval_batch_size") or max(1, batch // world),
        "eval_strategy": "steps" if config.get("eval_steps") else "no",
        "use_cpu": accelerate.device.type == "cpu",
        "accelerator_config": {"use_configured_state": True},  # else it resets every Accelerator's state
        "report_to": "none",
    }
    fields |= _saving(config) | _optimisation(config)
    # For one process it makes the first CUDA device current: put back the one that was.
    here = torch.cuda.device(torch.cuda.current_device()) if torch.cuda.is_initialized() else nullcontext()
    with here:
        args = TrainingArguments(**fields)
    args.output_dir = fields["output_dir"]  # it put a default in the place of None
    args.report_to = _tracker_names(config.get("report_to"))
    return args


def _saving(config: Mapping[str, Any]) -> dict[str, Any]:
    """When checkpoints are written, in words that pass TrainingArguments' checks."""
    metric = config.get("metric_for_best") or ("loss" if config.get("load_best") else None)
    fields: dict[str, Any] = {} if metric is None else {"greater_is_better": greater_is_better(metric)}
    if config.get("load_best"):  # "steps" would ask save_steps to be a multiple of eval_steps
        return fields | {"save_strategy": "best", "metric_for_best_model": metric}
    if config.get("save_steps"):
        return fields | {"save_strategy": "steps", "save_steps": config["save_steps"]}
    return fields | {"save_strategy": "no"}


def _optimisation(config: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if "betas" in config:
        fields["adam_beta1"], fields["adam_beta2"] = config["betas"]
    schedule, optimizer = config.get("schedule"), config.get("optimizer")
    if schedule in [kind.value for kind in SchedulerType]:
        fields["lr_scheduler_type"] = schedule
    optimizer = "adamw_torch" if optimizer == "adamw" else optimizer
    if optimizer in [kind.value for kind in OptimizerNames]:
        fields["optim"] = optimizer
    return fields


def _tracker_names(report_to: str | Sequence[str] | None) -> list[str]:
    """None, an empty sequence and "none" all mean none."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    return [name for name in names if name != "none"]


def _tracker(name: str) -> TrainerCallback:
    try:
        [kind] = get_reporting_integration_callbacks([name])
    except ValueError as error:
        raise ConfigError(f"report_to: expected names of trackers, got {name!r}: {error}") from error
    try:
        tracker: TrainerCallback = kind()
    except (ImportError, RuntimeError) as error:
        raise MissingPackageError(
            f"report_to: the tracker {name!r} cannot be used: {error} Install it with: pip install {name}"
        ) from error
    return tracker
