"""The loop every supervised trainer shares. `train()` is a loop over `step()`.

A subclass says what is minimised (`default_objective`) and how records are encoded
(`default_encoder`); everything else is here or one call away: the step in `ftlib.engine`, checkpoints
in `ftlib.trainers.checkpoints`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState

from ftlib.adapters import model_capabilities
from ftlib.adapters.attach import AnyModel
from ftlib.batches import PackedBatch
from ftlib.data.encode import Encoder
from ftlib.data.sampler import StepSampler
from ftlib.engine.callbacks import CallbackDispatcher, training_arguments, update_best
from ftlib.engine.config import TrainConfig
from ftlib.engine.determinism import (
    StopFlag,
    capture_rng,
    forked_rng,
    modes,
    restore_rng,
    rng_scope,
    stop_signals,
)
from ftlib.engine.engine import Engine, RandomState, Stopped
from ftlib.engine.progress import ProgressCallback
from ftlib.engine.window import LogWindow, peak_memory, step_row
from ftlib.errors import ConfigError
from ftlib.evaluation import decode, generate, perplexity
from ftlib.export import save
from ftlib.objectives import Objective
from ftlib.trainers.card import card_data
from ftlib.trainers.checkpoints import Checkpoints
from ftlib.trainers.identity import adapter_settings, data_fingerprint, plain, weights_fingerprint
from ftlib.trainers.inputs import AnyAdapter, context_length, encode, resolve_model
from ftlib.trainers.result import TrainResult
from ftlib.trainers.snapshot import Boundary, Counters

__all__ = ["Trainer"]

_REQUESTS = ("should_log", "should_evaluate", "should_save")  # what a step boundary may owe


class Trainer:
    """Supervised training on one device or several ranks. Use a subclass.

    Args:
        model: a loaded transformers or peft model, changed in place; or a name for `ftlib.load`.
        train_dataset: records (anything `load_records` takes) or encoded examples.
        eval_dataset: likewise, for `evaluate` and `eval_steps`.
        tokenizer: needed for records, `generate` and `save`; None takes the one beside the model.
        adapter: an `Adapter`, a `peft.PeftConfig`, or a saved adapter's folder; None trains what
            requires gradients.
        config: the run's settings.
        callbacks: transformers `TrainerCallback`s.
        objective: replaces the trainer's own.

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
    ) -> None:
        self.config = config or TrainConfig()
        self.model, self.tokenizer = resolve_model(model, tokenizer, adapter)
        self._encoder: Encoder | None = None
        self.train_data = self._encoded(train_dataset, "train_dataset")
        self.eval_data = None if eval_dataset is None else self._encoded(eval_dataset, "eval_dataset")
        if self.config.eval_steps is not None and self.eval_data is None:
            raise ConfigError("trainer: eval_steps has no effect without data. Give eval_dataset.")
        self.sampler = StepSampler(
            len(self.train_data),
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            shuffle=self.config.shuffle,
        )
        self.steps = self.config.max_steps or self.config.epochs * self.sampler.steps_per_epoch
        rate = self.config.learning_rate
        self.learning_rate = model_capabilities(self.model).learning_rate if rate is None else rate
        self.engine = Engine(
            self.model,
            objective or self.default_objective(),
            self.config,
            self.steps,
            self.learning_rate,
            should_stop=lambda: self._stopped_by() is not None,
        )
        self.boundary = Boundary()
        self.callbacks = self._dispatcher(callbacks)
        self.checkpoints = Checkpoints(
            self.model, self.engine, self.sampler, self.callbacks, identity=self._identity
        )
        self._flag: StopFlag | None = None  # while `train()` runs
        self._random: RandomState | None = None  # where an earlier `train()` left the generators
        self._best_weights: dict[str, Tensor] | None = None  # without a folder to keep them in
        self.callbacks.dispatch("on_init_end")

    # -- what a subclass says ------------------------------------------------------------------

    def default_objective(self) -> Objective:
        """What is minimised when the caller gives no objective."""
        raise NotImplementedError("abstract: use a trainer such as ftlib.SFTTrainer")

    def default_encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """How records become examples."""
        return Encoder(tokenizer)

    # -- the loop ------------------------------------------------------------------------------

    def train(
        self, resume: bool | str | Path | None = None, *, allow_changes: Sequence[str] = ()
    ) -> TrainResult:
        """Train to the planned number of steps, or until a signal, a callback or `stop()` ends it.

        Called again after a stop, it goes on from the weights the model has.

        Args:
            resume: True goes on from the newest checkpoint in `output_dir` that verifies, and starts
                fresh (saying so) where there is none; a path goes on from exactly that one.
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
                self._report_and_save()  # what a stop left owing at this boundary
                while self.boundary.counters.step < self.steps and not self._asked_to_stop():
                    self._train_step()
                    self._report_and_save()
            self._finish()
            return self._result(before)

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
        result = self.engine.step(batch)
        counters = self.boundary.counters
        counters.step += 1
        counters.tokens += result.tokens
        counters.examples += len(batch.spans) if isinstance(batch, PackedBatch) else len(batch)
        self.boundary.window.add(result)
        return {"step": counters.step, **step_row(result), "tokens": counters.tokens}

    def _train_step(self) -> None:
        """The next step of the plan, and what it makes due."""
        began, cursor = time.perf_counter(), self.sampler.state_dict()
        if cursor["offset"] == 0:
            self.callbacks.dispatch("on_epoch_begin")
        self.callbacks.dispatch("on_step_begin")
        try:
            self.step([self.train_data[index] for index in self.sampler.next_batch()])
        except BaseException:
            self.sampler.load_state_dict(cursor)  # its examples were not trained on
            raise
        self.boundary.counters.seconds += time.perf_counter() - began
        self._tell_state()
        step, config, control = self.boundary.counters.step, self.config, self.callbacks.control
        last = step == self.steps
        control.should_log |= last or _due(step, config.log_steps)
        control.should_evaluate |= _due(step, config.eval_steps) or (last and config.eval_steps is not None)
        control.should_save |= _due(step, config.save_steps)
        self.callbacks.dispatch("on_step_end")
        if self.sampler.state_dict()["offset"] == 0:
            self.callbacks.dispatch("on_epoch_end")

    def _report_and_save(self) -> None:
        """What is due at this step boundary, by the plan or at a callback's request."""
        if self.callbacks.control.should_log and self.boundary.window.sums:
            self._log()
        best = self.callbacks.control.should_evaluate and self._evaluate_and_log()
        if self.callbacks.control.should_save or (best and self.config.load_best):
            self._save(best=best)

    def _log(self) -> None:
        counters, window = self.boundary.counters, self.boundary.window
        row = {
            "step": counters.step,
            **window.row(),
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
        self.callbacks.dispatch("on_evaluate", metrics=metrics)
        self._record({"step": self.boundary.counters.step, **metrics})
        best = update_best(self.callbacks.args, self.state, metrics)
        if best:
            self.boundary.best = {"metric": self.state.best_metric, "step": self.state.best_global_step}
            if self.config.load_best and self.config.output_dir is None:
                self._best_weights = self.engine.masters.copies()
        return best

    def _record(self, row: dict[str, Any]) -> None:
        self.boundary.history.append(row)
        self.state.log_history.append(row)
        self.callbacks.dispatch("on_log", logs=dict(row))

    def _save(self, *, best: bool = False) -> None:
        control = self.callbacks.control
        control.should_save = False
        self.boundary.owing = [name for name in _REQUESTS if getattr(control, name)]
        if self.checkpoints.save(self.boundary, best=best):
            self.callbacks.dispatch("on_save")

    def _finish(self) -> None:
        if self.checkpoints.saved_step != self.boundary.counters.step:
            self._save()
        if self.config.load_best and self._best_weights is not None:
            self.engine.masters.load(self._best_weights)
        elif self.config.load_best and self.boundary.best["step"] is not None:
            self.checkpoints.load_best(self.boundary.best["step"])
        self.callbacks.dispatch("on_train_end")

    # -- what surrounds the loop ---------------------------------------------------------------

    @contextmanager
    def _run(self, resume: bool | str | Path | None, allow_changes: Sequence[str]) -> Iterator[None]:
        """Lock, random states, signals, modes and callbacks of one run; all given back on exit."""
        with ExitStack() as scope:
            scope.enter_context(self.checkpoints.lock())
            # dropout differs between ranks, as it does between the examples of one
            scope.enter_context(rng_scope(self.config.seed + self.engine.accelerator.process_index))
            scope.enter_context(modes(self.model))
            self._flag = scope.enter_context(stop_signals())
            scope.callback(setattr, self, "_flag", None)
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
        self.boundary, self._best_weights = boundary, None
        self._tell_state()
        self.state.log_history = list(boundary.history)
        self.state.best_metric = boundary.best["metric"]
        self.state.best_global_step = boundary.best["step"]
        for request in boundary.owing:
            setattr(self.callbacks.control, request, True)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on: settings, data and frozen weights."""
        return {
            **self.config.identity(),
            "learning_rate": self.learning_rate,
            "objective": plain(self.engine.objective),
            "adapter": adapter_settings(self.model),
            "data": data_fingerprint(self.train_data),
            "base_weights": weights_fingerprint(self.model),
        }

    def _asked_to_stop(self) -> bool:
        """On every rank as soon as on one."""
        if self.callbacks.control.should_training_stop:
            self._ask_to_stop("callback")
        stopping = self.engine.agreed(self._stopped_by() is not None)
        if stopping:
            self._ask_to_stop("another rank")
        return stopping

    def stop(self) -> None:
        """Ask a running `train()` to save and return; from a callback, another thread or a notebook."""
        self._ask_to_stop("stop()")

    def _ask_to_stop(self, by: str) -> None:
        """The first who asks is named."""
        if self._flag is not None and self._flag.stopped_by is None:
            self._flag.stopped_by = by

    def _stopped_by(self) -> str | None:
        return None if self._flag is None else self._flag.stopped_by

    def _result(self, before: Counters) -> TrainResult:
        counters, best = self.boundary.counters, self.boundary.best
        losses = [row["loss"] for row in self.boundary.history if "loss" in row]
        metrics = {
            "loss": losses[-1] if losses else math.nan,
            "steps": counters.step,
            **{name: value for name, value in asdict(counters).items() if name != "step"},
            "skipped_steps": self.engine.skipped,
            "tokens_per_second": (counters.tokens - before.tokens)
            / max(counters.seconds - before.seconds, 1e-9),
            "peak_memory_bytes": peak_memory(self.engine.device),
        }
        if best["step"] is not None:
            metrics |= {"best_metric": best["metric"], "best_step": best["step"]}
        return TrainResult(list(self.boundary.history), metrics, self._stopped_by())

    def _tell_state(self) -> None:
        """What callbacks read in `TrainerState`."""
        self.state.global_step = self.boundary.counters.step
        self.state.num_input_tokens_seen = self.boundary.counters.tokens
        self.state.epoch = self._epoch()

    def _epoch(self) -> float:
        return self.boundary.counters.examples / len(self.train_data)

    def _dispatcher(self, callbacks: Sequence[TrainerCallback | type[TrainerCallback]]) -> CallbackDispatcher:
        fields = {name: getattr(self.config, name) for name in TrainConfig.__dataclass_fields__}
        arguments = training_arguments(fields | {"learning_rate": self.learning_rate}, self.config.output_dir)
        self.state = TrainerState(
            max_steps=self.steps,
            num_train_epochs=-(-self.steps // self.sampler.steps_per_epoch),
            logging_steps=self.config.log_steps,
            eval_steps=self.config.eval_steps or 0,
            save_steps=self.config.save_steps or 0,
            train_batch_size=self.config.batch_size,
            is_local_process_zero=self.engine.accelerator.is_local_main_process,
            is_world_process_zero=self.engine.accelerator.is_main_process,
        )
        shown = self.config.progress
        self._progress = ProgressCallback(surface="auto" if shown == "off" else shown, disable=shown == "off")
        return CallbackDispatcher(
            [self._progress, *callbacks],
            self.model,
            self.tokenizer,
            arguments,
            self.state,
            TrainerControl(),
            optimizer=self.engine.optimizer,
            lr_scheduler=self.engine.schedule,
        )

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Call this callback too, after the others."""
        self.callbacks.add(callback)

    # -- using the model -----------------------------------------------------------------------

    @property
    def encoder(self) -> Encoder:
        """How this trainer encodes records and prompts.

        Raises:
            ConfigError: there is no tokenizer.
        """
        if self._encoder is None:
            self._encoder = self.default_encoder(self._tokenizer())
        return self._encoder

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ConfigError("trainer: records and prompts need a tokenizer. Give tokenizer=.")
        return self.tokenizer

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """Loss and metrics on `dataset`, or on the trainer's `eval_dataset`. Changes nothing.

        Returns:
            ``{"eval_loss", "eval_perplexity", ...}``; the perplexity is ``exp(eval_loss)``.
        """
        data = self.eval_data if dataset is None else self._encoded(dataset, "evaluate")
        if data is None:
            raise ConfigError(
                "evaluate: expected data, got none. Give a dataset here or eval_dataset to the trainer."
            )
        with forked_rng(), modes(self.model):
            output = self.engine.evaluate([data[index] for index in range(len(data))])
        loss = sum(float(mean.value) for mean in output.terms.values())
        metrics = {f"eval_{name}": float(mean.value) for name, mean in output.metrics.items()}
        return {"eval_loss": loss, "eval_perplexity": perplexity(loss), **metrics}

    def predict(self, dataset: Any) -> list[dict[str, float]]:
        """Loss and trained weight of each example, in order."""
        data = self._encoded(dataset, "predict")
        rows = []
        with forked_rng(), modes(self.model):
            for index in range(len(data)):
                terms = self.engine.evaluate([data[index]]).terms.values()
                loss, weight = (
                    sum(float(mean.value) for mean in terms),
                    sum(float(mean.count) for mean in terms),
                )
                rows.append({"loss": loss, "weight": weight})
        return rows

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        max_new_tokens: int = 128,
        do_sample: bool = False,
        **generation_options: Any,
    ) -> list[str]:
        """Completions of `prompts`, which go through the formatter the trainer trains with.

        Args:
            prompts: strings, message lists, or rows with a "prompt".
            max_new_tokens: per completion.
            do_sample: greedy when False.
            generation_options: of transformers' `GenerationConfig`, such as temperature.
        """
        tokenizer = self._tokenizer()
        encoded = [self.encoder.encode_prompt(prompt) for prompt in prompts]
        stops = self.encoder.stop_ids
        ids = generate(
            self.model,
            tokenizer,
            encoded,
            stop_ids=stops,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            **generation_options,
        )
        return decode(tokenizer, ids, stop_ids=stops)

    def save(self, folder: str | Path, *, samples: bool = True) -> Path:
        """The trained thing: adapter or model, tokenizer, model card.

        Loads in plain peft and transformers, with no ftlib installed.

        Args:
            folder: where to.
            samples: show up to three training examples, cut short, in the model card.
        """
        kind = type(self).__name__.removesuffix("Trainer")
        card = card_data(
            kind,
            self.config,
            self.learning_rate,
            self.train_data,
            self.tokenizer,
            self.boundary.history,
            samples=samples,
        )
        return save(folder, self.model, self.tokenizer, card=card)

    def _encoded(self, data: Any, name: str) -> Any:
        return encode(data, lambda: self.encoder, context_length(self.model), name=name)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
