"""Who is told of a run, and what they can read: the caller's callbacks, progress display and trackers."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState

from ftlib.engine.callbacks import CallbackDispatcher, training_arguments
from ftlib.engine.config import TrainConfig
from ftlib.engine.engine import Engine
from ftlib.engine.progress import ProgressCallback
from ftlib.errors import ConfigError

__all__ = ["dispatcher", "progress_display"]


def progress_display(config: TrainConfig) -> ProgressCallback:
    """The display that `TrainConfig.progress` asks for."""
    shown = config.progress
    return ProgressCallback(surface="auto" if shown == "off" else shown, disable=shown == "off")


def dispatcher(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase | None,
    display: TrainerCallback,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]],
    *,
    steps: int,
    epochs: int,
) -> CallbackDispatcher:
    """Calls `callbacks`, then the trackers named in `TrainConfig.report_to`.

    Args:
        engine: its model, settings and optimiser are what callbacks are handed.
        tokenizer: handed too.
        display: called before the others.
        callbacks: in the order they are called.
        steps: planned.
        epochs: passes over the data planned, the last one counted whole.

    Raises:
        ConfigError: something that is no callback among them, or one callback in place of a list.
    """
    if not isinstance(callbacks, Sequence):
        raise ConfigError(
            f"trainer: expected a list of callbacks, got {callbacks!r:.80}. Put it into a list: [callback]."
        )
    config, accelerator = engine.config, engine.accelerator
    fields = {name: getattr(config, name) for name in TrainConfig.__dataclass_fields__}
    arguments = training_arguments(fields | {"learning_rate": engine.learning_rate}, config.output_dir)
    state = TrainerState(
        max_steps=steps,
        num_train_epochs=epochs,
        logging_steps=config.log_steps,
        eval_steps=config.eval_steps or 0,
        save_steps=config.save_steps or 0,
        train_batch_size=config.batch_size,
        is_local_process_zero=accelerator.is_local_main_process,
        is_world_process_zero=accelerator.is_main_process,
    )
    return CallbackDispatcher(
        [display, *callbacks],
        engine.model,
        tokenizer,
        arguments,
        state,
        TrainerControl(),
        optimizer=engine.optimizer,
        lr_scheduler=engine.schedule,
    )
