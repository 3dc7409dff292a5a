"""The loop every supervised trainer shares. `train()` is a loop over `step()`.

A subclass says what is minimised and how records become examples:

| what | where | default |
|---|---|---|
| the loss | `default_objective` | none: abstract |
| the kind of model that a name loads | `task` | a causal language model |
| whether examples are comparisons | `compares` | no |
| the kind of its settings | `settings` | `TrainConfig` |
| the default peak rate, as a share of the adapter's | `rate_share` | all of it |
| the model trained, of one that is loaded | `prepare_model` | as it is |
| what an objective needs of that model | `prepare_objective` | nothing |
| the encoding of records | `default_encoder` | `Encoder(tokenizer)`, for the model's task |
| what an evaluation reports | `evaluation` | loss and metrics |
| what is predicted of each example | `predictions` | its loss and weight |
| why it writes no text | `no_generation` | it does |
| what else a checkpoint holds | `stateful_parts` | the objective, if it has a state |
| examples of one step of the plan | `examples_per_step` | `batch_size` |
| what that step does with them | `learn` | one optimiser step |
| what makes optimiser steps | `make_engine` | an `Engine` |
| the row that is logged | `shown` | as it is |

What is due between steps is in `ftlib.trainers.boundaries`; evaluation, prediction, generation and saving in
`ftlib.trainers.trained`; the step in `ftlib.engine`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase, TrainerCallback

from ftlib.adapters.attach import AnyModel
from ftlib.batches import PackedBatch
from ftlib.data.audit import warn_of_overlap
from ftlib.data.encode import Encoder
from ftlib.data.sampler import StepSampler
from ftlib.engine.config import TrainConfig
from ftlib.engine.determinism import capture_rng, modes, restore_rng, rng_scope
from ftlib.engine.engine import Engine, RandomState, StepResult, Stopped
from ftlib.engine.window import step_row
from ftlib.errors import ConfigError
from ftlib.objectives import Objective
from ftlib.trainers.boundaries import REQUESTS, Boundaries
from ftlib.trainers.checkpoints import Checkpoints
from ftlib.trainers.fit import planned_rate, require_fit
from ftlib.trainers.identity import identity
from ftlib.trainers.inputs import AnyAdapter, check_comparisons, check_encoder, resolve_model
from ftlib.trainers.observers import dispatcher, progress_display
from ftlib.trainers.options import checked_objective, checked_settings
from ftlib.trainers.result import TrainResult, result_of
from ftlib.trainers.snapshot import Boundary, Stateful
from ftlib.trainers.stops import Stops

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


class Trainer(Boundaries):
    """Supervised training on one device or several ranks. Use a subclass.

    Args:
        model: a loaded transformers or peft model, changed in place; or a name for `ftlib.load`.
        train_dataset: records (anything `load_records` takes) or encoded examples.
        eval_dataset: likewise, for `evaluate` and `eval_steps`.
        tokenizer: needed for records, `generate` and `save`; None takes the one beside the model.
        adapter: an `Adapter`, a `peft.PeftConfig`, or a saved adapter's folder; None trains what
            requires gradients.
        config: the run's settings.
        callbacks: transformers `TrainerCallback`s, told what transformers' own trainer tells, in its
            order, less what belongs to micro-batches (`on_substep_end`, `on_prediction_step`).
        objective: replaces the trainer's own.
        encoder: encodes records and prompts; None makes the trainer's default one. Give the one that
            encoded the data, so that `generate` sees prompts as training did.

    Raises:
        ConfigError: options that clash, or nothing to train.
        DataError: bad rows, all of them at once, before anything is trained.
        CapabilityError: a model or adapter this trainer cannot train.
    """

    def __init__(
        self,
        model: AnyModel | str | Path,
        train_dataset: Any,
        eval_dataset: Any = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        adapter: AnyAdapter | None = None,
        config: TrainConfig | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        objective: Objective | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        # 1. what is trained, and on what
        self.config = checked_settings(config, self.settings, type(self).__name__)
        objective = checked_objective(objective)
        self.model, self.tokenizer = resolve_model(
            model, tokenizer, adapter, task=self.task, prepare=self.prepare_model
        )
        require_fit(self.model, self.config)
        self._encoder = check_encoder(encoder, self.model)
        self.train_data = self._encoded(train_dataset, "train_dataset")
        self._encoded_elsewhere = self._encoder is None
        self.eval_data = None if eval_dataset is None else self._encoded(eval_dataset, "eval_dataset")
        if self.config.eval_steps is not None and self.eval_data is None:
            raise ConfigError("trainer: eval_steps has no effect without data. Give eval_dataset.")
        if self.compares and objective is None:
            check_comparisons(self.train_data, "train_dataset")
            check_comparisons(self.eval_data or (), "eval_dataset")
        warn_of_overlap(self.train_data, self.eval_data)
        # 2. the plan
        self.sampler = StepSampler(
            len(self.train_data),
            batch_size=self.examples_per_step,
            seed=self.config.seed,
            shuffle=self.config.shuffle,
        )
        per_epoch = self.sampler.steps_per_epoch
        self.steps = self.config.max_steps or self.config.epochs * per_epoch
        self.learning_rate = planned_rate(self.model, self.config, self.rate_share)
        # 3. what steps, who is told, and what is kept
        self._stops = Stops()
        minimised = self.default_objective() if objective is None else objective
        self.engine = self.make_engine(self.prepare_objective(minimised))
        self._progress = progress_display(self.config)
        self.callbacks = dispatcher(
            self.engine,
            self.tokenizer,
            self._progress,
            callbacks,
            steps=self.steps,
            epochs=-(-self.steps // per_epoch),
        )
        self.state = self.callbacks.state
        self.checkpoints = Checkpoints(
            self.model,
            self.engine,
            self.sampler,
            self.callbacks,
            identity=lambda: identity(self.engine, self.model, self.train_data),
            parts=self.stateful_parts,
        )
        self.boundary = Boundary()
        self._epoch_ends = False
        self._random: RandomState | None = None  # where an earlier `train()` left the generators
        self._set_best = None
        self.callbacks.dispatch("on_init_end")

    # -- what a subclass says ------------------------------------------------------------------

    task: ClassVar[str] = "causal_lm"  # of `ftlib.load`, for a model given by name
    compares: ClassVar[bool] = False  # whether every example must hold two answers or more
    settings: ClassVar[type[TrainConfig]] = TrainConfig  # what `config` is
    rate_share: ClassVar[float] = 1.0  # of the adapter's supervised learning rate

    def default_objective(self) -> Objective:
        """What is minimised when the caller gives no objective."""
        raise NotImplementedError("abstract: use a trainer such as ftlib.SFTTrainer")

    def prepare_model(
        self,
        model: AnyModel,
        tokenizer: PreTrainedTokenizerBase | None,  # noqa: ARG002  for a subclass
    ) -> AnyModel:
        """The model to train, from one that is loaded; before an adapter is attached and data are encoded."""
        return model

    def prepare_objective(self, objective: Objective) -> Objective:
        """The objective to minimise, from the caller's or the default one; the model is ready by now."""
        return objective

    @property
    def examples_per_step(self) -> int:
        """How many examples one step of the plan takes."""
        return self.config.batch_size

    def make_engine(self, objective: Objective) -> Engine:
        """What makes the optimiser steps."""
        return Engine(
            self.model,
            objective,
            self.config,
            self.steps,
            self.learning_rate,
            should_stop=lambda: self._stops.asked,
            before_update=lambda: self.callbacks.dispatch("on_pre_optimizer_step"),
            after_update=lambda: self.callbacks.dispatch("on_optimizer_step"),
        )

    def learn(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """What one step of the plan does with its examples."""
        return self.step(rows)

    def stateful_parts(self) -> Mapping[str, Stateful]:
        """What has a state beside weights and optimiser, such as a moving reference; by name.

        It goes into every checkpoint and comes back on resume.
        """
        objective = self.engine.objective
        return {"objective": objective} if isinstance(objective, Stateful) else {}

    # -- the loop ------------------------------------------------------------------------------

    def train(
        self, resume: bool | str | Path | None = None, *, allow_changes: Sequence[str] = ()
    ) -> TrainResult:
        """Train to the planned number of steps, or until a signal, a callback or `stop()` ends it.

        Called again after a stop, it goes on from the weights the model has.

        Args:
            resume: True goes on from the newest checkpoint in `output_dir` that verifies, and starts
                fresh (saying so) where there is none; of several runs in it, the last one with these
                settings and data is taken. A path goes on from exactly that one.
            allow_changes: settings that may differ from the checkpoint's; the present ones then count.

        Returns:
            History, final numbers, and what stopped the run early.

        Raises:
            CheckpointError: a checkpoint that fails verification, or was made with other settings or data.
            NonFiniteError: see `TrainConfig.on_nonfinite`.
        """
        with self._run(resume, allow_changes):
            before = replace(self.boundary.counters)
            with suppress(Stopped):  # a step, or an evaluation, left for the next run
                if self.boundary.phase is None:  # else that is due at the end of the step that was cut
                    self._settle()  # what a stop left owing at this boundary
                if self._done():
                    logger.warning(
                        "train: all %d planned steps are made, and none is left. To train on, make a new "
                        "trainer of this model.",
                        self.boundary.counters.step,
                    )
                while not self._done() and not self._asked_to_stop():
                    self._train_step()
                    self._settle()
            self._finish()
            return result_of(self.boundary, before, self.engine, self._stops.by)

    def step(self, batch: PackedBatch | Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """One optimiser step.

        Args:
            batch: records, encoded examples, or one collated batch.

        Returns:
            ``{"step", "loss", "grad_norm", "learning_rate", "tokens", ...}`` of this step.
        """
        if not isinstance(batch, PackedBatch):
            data = self._encoded(batch, "step")
            batch = [data[index] for index in range(len(data))]
        examples = len(batch.spans) if isinstance(batch, PackedBatch) else len(batch)
        return self._count(self.engine.step(batch), examples)

    def _count(self, result: StepResult, examples: int) -> dict[str, float]:
        """Enter a step into counters and window, and tell of it."""
        counters = self.boundary.counters
        counters.step += 1
        counters.tokens += result.tokens
        counters.examples += examples
        self.boundary.window.add(result)
        if counters.step == self.steps + 1 and result.learning_rate == 0 < self.learning_rate:
            logger.warning(
                "step %d is past the %d that were planned, where the schedule is at 0: nothing is learned. "
                "For a loop of your own set schedule='constant', or max_steps to as many steps as it makes.",
                counters.step,
                self.steps,
            )
        return {"step": counters.step, **self.shown(step_row(result)), "tokens": counters.tokens}

    def _train_step(self) -> None:
        """The next step of the plan, and what it makes due."""
        began, cursor = time.perf_counter(), self.sampler.state_dict()
        self._begin_step()
        try:
            self.learn([self.train_data[index] for index in self.sampler.next_batch()])
        except BaseException:
            self.sampler.load_state_dict(cursor)  # its examples were not trained on, or not to the end
            raise
        finally:
            self.boundary.counters.seconds += time.perf_counter() - began
        self._tell_state()
        self._ask_for_the_planned()
        self.callbacks.dispatch("on_step_end")

    # -- what surrounds the loop ---------------------------------------------------------------

    @contextmanager
    def _run(self, resume: bool | str | Path | None, allow_changes: Sequence[str]) -> Iterator[None]:
        """Lock, random states, signals, modes and callbacks of one run; all given back on exit."""
        with ExitStack() as scope:
            scope.enter_context(self.checkpoints.lock())
            # dropout differs between ranks, as it does between the examples of one
            scope.enter_context(rng_scope(self.config.seed + self.engine.accelerator.process_index))
            scope.enter_context(modes(self.model))
            scope.enter_context(self._stops.listening())
            scope.callback(self._progress.close)
            if self._random is not None:
                restore_rng(*self._random)
            self._resume(resume, allow_changes)
            self.boundary.window.started = time.perf_counter()
            self.callbacks.dispatch("on_train_begin")
            try:
                yield
            except Exception as error:
                error.add_note(f"in training step {self.boundary.counters.step + 1} of {self.steps}")
                raise
            finally:
                self._random = capture_rng()

    def _resume(self, resume: bool | str | Path | None, allow_changes: Sequence[str]) -> None:
        boundary = self.checkpoints.resume(resume, allow_changes)
        if boundary is None:
            return
        self.boundary, self._set_best = boundary, None
        self._tell_state()
        self.state.log_history = list(boundary.history)
        self.state.best_metric = boundary.best["metric"]
        self.state.best_global_step = boundary.best["step"]
        self._epoch_ends = "on_epoch_end" in boundary.owing
        for request in REQUESTS:
            setattr(self.callbacks.control, request, request in boundary.owing)

    def _asked_to_stop(self) -> bool:
        """On every rank as soon as on one."""
        if self.callbacks.control.should_training_stop:
            self._stops.ask("callback")
        stopping = self.engine.agreed(self._stops.asked)
        if stopping:
            self._stops.ask("another rank")
        return stopping

    def stop(self) -> None:
        """Ask a running `train()` to save and return; from a callback, another thread or a notebook."""
        self._stops.ask("stop()")

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Call this callback too, after the others."""
        self.callbacks.add(callback)
