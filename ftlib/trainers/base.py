"""The loop every supervised trainer shares. `train()` is a loop over `step()`.

A subclass says what is minimised (`default_objective`) and how records are encoded
(`default_encoder`); everything else is here or one call away in `ftlib.engine`.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState

from ftlib.adapters import model_capabilities
from ftlib.adapters.attach import AnyModel
from ftlib.batches import PackedBatch
from ftlib.data.encode import Encoder
from ftlib.data.sampler import StepSampler
from ftlib.engine.callbacks import CallbackDispatcher, training_arguments, update_best
from ftlib.engine.changes import refuse_changes
from ftlib.engine.checkpoint import CheckpointStore
from ftlib.engine.config import TrainConfig
from ftlib.engine.determinism import StopFlag, forked_rng, modes, rng_scope, stop_signals
from ftlib.engine.engine import Engine, Stopped
from ftlib.engine.lock import RunLock
from ftlib.engine.manifest import newest_valid, verify, versions
from ftlib.engine.progress import ProgressCallback
from ftlib.engine.window import LogWindow, peak_memory, step_row
from ftlib.errors import ConfigError
from ftlib.evaluation.generation import decode, generate
from ftlib.export import save
from ftlib.objectives import Objective
from ftlib.trainers import snapshot
from ftlib.trainers.card import card_data
from ftlib.trainers.inputs import (
    AnyAdapter,
    context_length,
    data_fingerprint,
    encode,
    resolve_model,
    weights_fingerprint,
)
from ftlib.trainers.result import TrainResult

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


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
        limit = context_length(self.model)
        self.train_data = encode(train_dataset, lambda: self.encoder, limit, name="train_dataset")
        self.eval_data = (
            None
            if eval_dataset is None
            else encode(eval_dataset, lambda: self.encoder, limit, name="eval_dataset")
        )
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
            should_stop=lambda: self._flag.stopped_by is not None,
        )
        self.boundary = snapshot.Boundary()
        self._flag = StopFlag()
        self._store: CheckpointStore | None = None
        self._best_weights: dict[str, torch.Tensor] | None = None
        self._base_hash: str | None = None
        self._resumed_from: Path | None = None
        self._saved_step: int | None = None
        self.callbacks = self._dispatcher(callbacks)
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

        Args:
            resume: True goes on from the newest checkpoint in `output_dir` that verifies, and starts
                fresh (saying so) where there is none; a path goes on from exactly that one.
            allow_changes: settings that may differ from the checkpoint's.

        Returns:
            History, final numbers, and what stopped the run early.

        Raises:
            CheckpointError: a checkpoint that fails verification, or was made with other settings or data.
            NonFiniteError: see `TrainConfig.on_nonfinite`.
        """
        with self._run(resume, allow_changes):
            began, tokens_before = time.perf_counter(), self.boundary.counters.tokens
            while self.boundary.counters.step < self.steps and not self._asked_to_stop():
                cursor = self.sampler.state_dict()
                rows = [self.train_data[index] for index in self.sampler.next_batch()]
                try:
                    self._train_step(rows)
                except Stopped:  # weights and random states are those of the last boundary
                    self.sampler.load_state_dict(cursor)
                    break
                self._report_and_save()
            seconds = time.perf_counter() - began
            self._finish()
        return self._result(seconds, self.boundary.counters.tokens - tokens_before)

    def step(self, batch: PackedBatch | Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """One optimiser step.

        Args:
            batch: records, encoded examples, or one collated batch.

        Returns:
            ``{"step", "loss", "grad_norm", "learning_rate", "tokens", ...}`` of this step.
        """
        if not isinstance(batch, PackedBatch):
            data = encode(batch, lambda: self.encoder, context_length(self.model), name="step")
            batch = [data[index] for index in range(len(data))]
        result = self.engine.step(batch)
        counters = self.boundary.counters
        counters.step += 1
        counters.tokens += result.tokens
        counters.examples += len(batch.spans) if isinstance(batch, PackedBatch) else len(batch)
        self.boundary.window.add(result)
        return {"step": counters.step, **step_row(result), "tokens": counters.tokens}

    def _train_step(self, rows: Sequence[Mapping[str, Any]]) -> None:
        began = time.perf_counter()
        self.callbacks.dispatch("on_step_begin")
        self.step(rows)
        self.boundary.counters.seconds += time.perf_counter() - began
        self.state.global_step = self.boundary.counters.step
        self.state.epoch = self._epoch()
        self.state.num_input_tokens_seen = self.boundary.counters.tokens
        self.callbacks.dispatch("on_step_end")
        if self.sampler.state_dict()["offset"] == 0:
            self.callbacks.dispatch("on_epoch_end")

    def _report_and_save(self) -> None:
        step, config, control = self.boundary.counters.step, self.config, self.callbacks.control
        last = step == self.steps
        if step % config.log_steps == 0 or last or control.should_log:
            self._log()
        best = False
        if (
            _due(step, config.eval_steps)
            or control.should_evaluate
            or (last and config.eval_steps is not None)
        ):
            best = self._evaluate_and_log()
        if _due(step, config.save_steps) or control.should_save or (best and config.load_best):
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
        metrics = self.evaluate()
        self.callbacks.dispatch("on_evaluate", metrics=metrics)
        self._record({"step": self.boundary.counters.step, **metrics})
        best = update_best(self.callbacks.args, self.state, metrics)
        if best:
            self.boundary.best = {"metric": self.state.best_metric, "step": self.state.best_global_step}
            if self.config.load_best and self._store is None:
                masters = self.engine.masters.named
                self._best_weights = {name: weight.detach().clone() for name, weight in masters.items()}
        return best

    def _record(self, row: dict[str, Any]) -> None:
        self.boundary.history.append(row)
        self.state.log_history.append(row)
        self.callbacks.dispatch("on_log", logs=dict(row))

    def _finish(self) -> None:
        if self.boundary.counters.step == self.steps and self.boundary.window.sums:
            self._log()
        if self._saved_step != self.boundary.counters.step:
            self._save()
        if self.config.load_best:
            self._load_best()
        self.callbacks.dispatch("on_train_end")

    # -- what surrounds the loop ---------------------------------------------------------------

    @contextmanager
    def _run(self, resume: bool | str | Path | None, allow_changes: Sequence[str]) -> Iterator[None]:
        """Lock, random states, signals, modes and callbacks of one run; all given back on exit."""
        with ExitStack() as scope:
            if self.config.output_dir is not None and self.engine.accelerator.is_main_process:
                scope.enter_context(RunLock(self.config.output_dir))
            scope.enter_context(rng_scope(self.config.seed))
            scope.enter_context(modes(self.model))
            self._flag = scope.enter_context(stop_signals())
            run_id = self._resume(resume, allow_changes) or uuid.uuid4().hex[:12]
            if self.config.output_dir is not None and self.engine.accelerator.is_main_process:
                self._store = CheckpointStore(
                    self.config.output_dir,
                    run_id=run_id,
                    keep=self.config.keep_checkpoints,
                    resumed_from=self._resumed_from,
                )
            self.boundary.window.started = time.perf_counter()
            self.callbacks.dispatch("on_train_begin")
            try:
                yield
            except Exception as error:
                error.add_note(f"in training step {self.boundary.counters.step + 1} of {self.steps}")
                raise

    def _resume(self, resume: bool | str | Path | None, allow_changes: Sequence[str]) -> str | None:
        """Set the state of a checkpoint; its run id, or None for a fresh start."""
        self._resumed_from = self._checkpoint_to_resume(resume)
        if self._resumed_from is None:
            return None
        manifest = verify(self._resumed_from)
        refuse_changes(
            manifest["config"], self._identity(), allow_changes=allow_changes, where=str(self._resumed_from)
        )
        self._saved_step = manifest["step"]
        self.boundary, remembered = snapshot.read(self._resumed_from, self.engine, self.sampler)
        self.callbacks.restore_states(remembered)
        self.state.global_step = self.boundary.counters.step
        self.state.epoch = self._epoch()
        self.state.log_history = list(self.boundary.history)
        self.state.best_metric = self.boundary.best["metric"]
        self.state.best_global_step = self.boundary.best["step"]
        logger.info("resuming from %s at step %d", self._resumed_from, self.boundary.counters.step)
        return str(manifest["run_id"])

    def _checkpoint_to_resume(self, resume: bool | str | Path | None) -> Path | None:
        if resume is None or resume is False:
            return None
        if resume is not True:
            return Path(resume)
        if self.config.output_dir is None:
            raise ConfigError("train: resume=True has no folder to look in. Set TrainConfig.output_dir.")
        found = newest_valid(self.config.output_dir)
        for path, reason in found.skipped:
            logger.warning("passed over the checkpoint %s: %s", path, reason)
        if found.path is None:
            logger.warning("no checkpoint in %s to resume from: starting fresh", self.config.output_dir)
        return found.path

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on: settings, data and frozen weights."""
        if self._base_hash is None:
            self._base_hash = weights_fingerprint(self.model)
        return {
            **self.config.identity(),
            "learning_rate": self.learning_rate,
            "data": data_fingerprint(self.train_data),
            "base_weights": self._base_hash,
        }

    def _save(self, *, best: bool = False) -> None:
        """A checkpoint of the present step boundary, in `output_dir`."""
        if self._store is None:
            return

        def write(folder: Path) -> None:
            self.model.save_pretrained(str(folder), safe_serialization=True)
            (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
            snapshot.write(folder, self.engine, self.sampler, self.boundary, self.callbacks.states())

        manifest = {"config": self._identity(), "versions": versions()}
        path = self._store.save(
            self.boundary.counters.step,
            write,
            manifest=manifest,
            expected_bytes=snapshot.expected_bytes(self.engine),
            best=best,
        )
        self._saved_step = self.boundary.counters.step
        logger.info("saved %s", path)
        self.callbacks.dispatch("on_save")

    def _load_best(self) -> None:
        if self._best_weights is not None:
            self.engine.masters.load(self._best_weights)
        elif self._store is not None and self.boundary.best["step"] is not None:
            step = self.boundary.best["step"]
            folders = [path for path in self._store.folder.glob(f"checkpoint-{step:08d}*")]
            snapshot.load_weights(folders[0], self.engine)

    def _asked_to_stop(self) -> bool:
        if self._flag.stopped_by is None and self.callbacks.control.should_training_stop:
            self._flag.stopped_by = "callback"
        return self._flag.stopped_by is not None

    def stop(self) -> None:
        """Ask a running `train()` to save and return; from a callback, another thread or a notebook."""
        self._flag.stopped_by = self._flag.stopped_by or "stop()"

    def _result(self, seconds: float, tokens: int) -> TrainResult:
        losses = [row["loss"] for row in self.boundary.history if "loss" in row]
        metrics = {
            "loss": losses[-1] if losses else math.nan,
            **asdict(self.boundary.counters),
            "steps": self.boundary.counters.step,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "peak_memory_bytes": peak_memory(self.engine.device),
        }
        del metrics["step"]
        if self.boundary.best["step"] is not None:
            metrics |= {"best_metric": self.boundary.best["metric"], "best_step": self.boundary.best["step"]}
        return TrainResult(list(self.boundary.history), metrics, self._flag.stopped_by)

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
        shown = [] if self.config.progress == "off" else [ProgressCallback(surface=self.config.progress)]
        return CallbackDispatcher(
            [*shown, *callbacks],
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
            if self.tokenizer is None:
                raise ConfigError("trainer: records and prompts need a tokenizer. Give tokenizer=.")
            self._encoder = self.default_encoder(self.tokenizer)
        return self._encoder

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """Loss and metrics on `dataset`, or on the trainer's `eval_dataset`. Changes nothing.

        Returns:
            ``{"eval_loss", "eval_perplexity", ...}``; the perplexity is ``exp(eval_loss)``.
        """
        data = self.eval_data if dataset is None else self._encode(dataset, "evaluate")
        if data is None:
            raise ConfigError(
                "evaluate: expected data, got none. Give a dataset here or eval_dataset to the trainer."
            )
        with forked_rng(), modes(self.model):
            output = self.engine.evaluate([data[index] for index in range(len(data))])
        loss = sum(float(mean.value) for mean in output.terms.values())
        metrics = {f"eval_{name}": float(mean.value) for name, mean in output.metrics.items()}
        return {"eval_loss": loss, "eval_perplexity": _exp(loss), **metrics}

    def predict(self, dataset: Any) -> list[dict[str, float]]:
        """Loss and trained weight of each example, in order."""
        data = self._encode(dataset, "predict")
        rows = []
        with forked_rng(), modes(self.model):
            for index in range(len(data)):
                (mean,) = self.engine.evaluate([data[index]]).terms.values()
                rows.append({"loss": float(mean.value), "weight": float(mean.count)})
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
        encoded = [self.encoder.encode_prompt(prompt) for prompt in prompts]
        stops = self.encoder.stop_ids
        ids = generate(
            self.model,
            self.tokenizer,
            encoded,
            stop_ids=stops,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            **generation_options,
        )
        return decode(self.tokenizer, ids, stop_ids=stops)

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

    def _encode(self, dataset: Any, name: Literal["evaluate", "predict"]) -> Any:
        return encode(dataset, lambda: self.encoder, context_length(self.model), name=name)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
