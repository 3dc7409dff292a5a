"""What is due between two steps: a log row, an evaluation, a checkpoint, the end of an epoch.

The plan and the callbacks ask through the switches of transformers' `TrainerControl`; here they are
answered, in the order of transformers' own trainer. What is still unanswered goes into the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerState

from ftlib.data.sampler import StepSampler
from ftlib.engine.callbacks import CallbackDispatcher, update_best
from ftlib.engine.window import LogWindow, peak_memory
from ftlib.trainers.checkpoints import Checkpoints
from ftlib.trainers.snapshot import Stateful, kept_weights
from ftlib.trainers.trained import TrainedModel

__all__ = ["REQUESTS", "Boundaries"]

REQUESTS = ("should_log", "should_evaluate", "should_save")  # what a step boundary may owe


class Boundaries(TrainedModel):
    """The part of `Trainer` between its steps."""

    steps: int
    sampler: StepSampler
    callbacks: CallbackDispatcher
    checkpoints: Checkpoints
    state: TrainerState
    _epoch_ends: bool  # and its end is not yet told
    _set_best: Callable[[], None] | None  # where no checkpoint holds the best weights

    def stateful_parts(self) -> Mapping[str, Stateful]:
        """What has a state beside weights and optimiser; a subclass says it."""
        raise NotImplementedError

    def shown(self, row: dict[str, float]) -> dict[str, float]:
        """The row of a step or of several, as it is logged."""
        return row

    def _begin_step(self) -> None:
        """Tell of it. What was asked for inside a step that a stop has cut stays due at its end."""
        asked = () if self.boundary.phase is None else (*REQUESTS, "should_epoch_stop")
        due = [request for request in asked if getattr(self.callbacks.control, request)]
        if self.sampler.state_dict()["offset"] == 0:
            self.callbacks.dispatch("on_epoch_begin")
        self.callbacks.dispatch("on_step_begin")
        for request in due:
            setattr(self.callbacks.control, request, True)

    def _ask_for_the_planned(self) -> None:
        """After a step: what the plan has due."""
        step, config, control = self.boundary.counters.step, self.config, self.callbacks.control
        control.should_log |= _due(step, config.log_steps)
        control.should_evaluate |= _due(step, config.eval_steps)
        control.should_save |= _due(step, config.save_steps)
        self._ask_for_the_last()
        self._epoch_ends |= self.sampler.state_dict()["offset"] == 0

    def _ask_for_the_last(self) -> None:
        """The last step is always logged, and evaluated if any is; once."""
        control, step = self.callbacks.control, self.boundary.counters.step
        evaluated = {row["step"] for row in self.boundary.history[-2:] if "loss" not in row}
        control.should_log |= self._done()
        control.should_evaluate |= (
            self._done() and self.config.eval_steps is not None and step not in evaluated
        )

    def _settle(self) -> None:
        """Everything that is due here, by the plan or at a callback's request; last the epoch's end."""
        self._report_and_save()
        self._epoch_ends |= self.engine.agreed(self.callbacks.control.should_epoch_stop)
        if self._epoch_ends:
            self._end_epoch()
            self._report_and_save()  # what its end asked for

    def _end_epoch(self) -> None:
        cursor = self.sampler.state_dict()
        if cursor["offset"]:  # a callback wants the rest of it left out
            self.sampler.load_state_dict({"epoch": cursor["epoch"] + 1, "offset": 0})
            self._tell_state()
            self._ask_for_the_last()
        self.callbacks.dispatch("on_epoch_end")
        self._epoch_ends = self.callbacks.control.should_epoch_stop = False

    def _report_and_save(self) -> None:
        if self.callbacks.control.should_log and self.boundary.window.sums:
            self._log()
        best = self.callbacks.control.should_evaluate and self._evaluate_and_log()
        if self.callbacks.control.should_save or (best and self.config.load_best):
            self._save(best=best)

    def _log(self) -> None:
        counters, window = self.boundary.counters, self.boundary.window
        row = {
            "step": counters.step,
            **self.shown(window.row()),
            "tokens": counters.tokens,
            "epoch": self._epoch(),
            "tokens_per_second": window.speed(),
            "peak_memory_bytes": peak_memory(self.engine.device),
        }
        self.boundary.window = LogWindow()
        self._record(row)

    def _evaluate_and_log(self) -> bool:
        """Whether this is the best evaluation so far."""
        metrics = self.evaluate()
        self._record({"step": self.boundary.counters.step, **metrics})
        self.callbacks.dispatch("on_evaluate", metrics=metrics)
        best = update_best(self.callbacks.args, self.state, metrics)
        if best:
            self.boundary.best = {"metric": self.state.best_metric, "step": self.state.best_global_step}
            self._set_best = None
        return best

    def _record(self, row: dict[str, Any]) -> None:
        self.boundary.history.append(row)
        self.state.log_history.append(row)
        self.callbacks.dispatch("on_log", logs=dict(row))

    def _save(self, *, best: bool = False) -> None:
        control = self.callbacks.control
        control.should_save = False
        if self.checkpoints.saved == self.boundary.place and not best:
            return
        self.boundary.owing = [name for name in REQUESTS if getattr(control, name)]
        if self._epoch_ends or control.should_epoch_stop:
            self.boundary.owing.append("on_epoch_end")
        if self.checkpoints.save(self.boundary, best=best):
            self.callbacks.dispatch("on_save")
        elif best and self.config.load_best:
            self._set_best = kept_weights(self.engine, self.stateful_parts())

    def _finish(self) -> None:
        self._save()
        if self.config.load_best and self.boundary.best["step"] is not None:
            if self._set_best is not None:
                self._set_best()
            else:
                self.checkpoints.load_best(self.boundary.best["step"])
            self.boundary.phase = None  # of other weights
        self.callbacks.dispatch("on_train_end")

    def _done(self) -> bool:
        """All steps are made, or all epochs passed; a callback may have ended some of these early."""
        passed = self.config.max_steps is None and self.sampler.state_dict()["epoch"] >= self.config.epochs
        return passed or self.boundary.counters.step >= self.steps

    def _tell_state(self) -> None:
        """What callbacks read in `TrainerState`."""
        self.state.global_step = self.boundary.counters.step
        self.state.num_input_tokens_seen = self.boundary.counters.tokens
        self.state.epoch = self._epoch()

    def _epoch(self) -> float:
        cursor = self.sampler.state_dict()
        return cursor["epoch"] + cursor["offset"] / self.sampler.size


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
