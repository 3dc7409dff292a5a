"""The settings of a training run, checked when they are made."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.trainer_utils import SchedulerType

from ftlib.checks import COUNT, NATURAL, PATH, SWITCH, TEXT, Wanted, check, listed, number, one_of
from ftlib.errors import ConfigError

__all__ = ["MakeOptimizer", "MakeSchedule", "TrainConfig", "suggests_names"]

MakeOptimizer = Callable[[list[dict[str, Any]], float], Optimizer]
MakeSchedule = Callable[[Optimizer, int], LRScheduler]
Shown = Literal["auto", "terminal", "plain", "notebook", "off"]
OnNonFinite = Literal["raise", "skip"]
OnSaveError = Literal["raise", "warn"]
Made = TypeVar("Made", bound=type)
_NEEDS_METRICS = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)  # a step alone does not move them
_SCHEDULES = sorted(kind.value for kind in SchedulerType if kind not in _NEEDS_METRICS)
_NONNEGATIVE = number(0)
_SHARE = number(0, below=1)
_NAMES = listed("names", TEXT.holds)

_WANTED: Mapping[str, Wanted] = {
    "output_dir": PATH.or_none,
    **dict.fromkeys(("epochs", "batch_size", "log_steps", "keep_checkpoints"), COUNT),
    **dict.fromkeys(
        ("max_steps", "max_tokens", "eval_steps", "eval_batch_size", "save_steps"), COUNT.or_none
    ),
    "learning_rate": _NONNEGATIVE.or_none,
    **dict.fromkeys(("warmup", "weight_decay", "eps"), _NONNEGATIVE),
    "max_grad_norm": number(above=0, most=inf),  # infinity never clips
    "betas": Wanted(
        "two numbers in [0, 1)",
        lambda value: isinstance(value, list | tuple) and len(value) == 2 and all(map(_SHARE.holds, value)),
    ),
    "seed": Wanted(
        "a whole number from 0 to 2**32 - 1", lambda value: NATURAL.holds(value) and value < 2**32
    ),
    **dict.fromkeys(("shuffle", "gradient_checkpointing", "load_best"), SWITCH),
    **dict.fromkeys(("run_name", "metric_for_best"), TEXT.or_none),
    "report_to": Wanted(
        "names of trackers", lambda value: value is None or TEXT.holds(value) or _NAMES.holds(value)
    ),
    "schedule": Wanted(
        f"a function of (optimizer, steps), or one of {_SCHEDULES}",
        lambda value: callable(value) or (TEXT.holds(value) and value in _SCHEDULES),
    ),
    "optimizer": Wanted(
        "'adamw', or a function of (parameter groups, learning rate)",
        lambda value: callable(value) or (TEXT.holds(value) and value == "adamw"),
    ),
    "progress": one_of(Shown),
    "on_nonfinite": one_of(OnNonFinite),
    "on_save_error": one_of(OnSaveError),
}


def suggests_names(cls: Made) -> Made:
    """Class decorator: an unknown option raises `ConfigError` with the nearest name."""
    made = cls.__init__  # type: ignore[misc]  # of this very class, not of an instance's

    @functools.wraps(made)
    def init(self: Any, *args: Any, **options: Any) -> None:
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(known)}."
                raise ConfigError(f"{cls.__name__}: got an unknown option {name!r}. {hint}")
        made(self, *args, **options)

    cls.__init__ = init  # type: ignore[misc]
    return cls


@suggests_names
@dataclass(frozen=True)
class TrainConfig:
    """Settings of a supervised run.

    Args:
        output_dir: where checkpoints go; None writes nothing to disk.
        epochs: passes over the data, >= 1; `max_steps` overrides it.
        max_steps: optimiser steps, >= 1.
        learning_rate: peak; None takes the trainer's default for the adapter (2e-4 for LoRA, 2e-5 for all
            weights; a fifth of that in DPO and PPO).
        batch_size: examples (pairs, prompts) in one optimiser step over all ranks.
        max_tokens: most tokens of one micro-batch; bounds memory and does not change the result. None is
            768 on CPU and 16,384 on other devices. A longer example runs alone, with checkpointing.
        shuffle: a new order each epoch, from (seed, epoch).
        seed: of the order, the initialisation of nothing else, and of dropout.
        schedule: a name that `transformers.get_scheduler` knows, or a function of (optimizer, steps).
        warmup: a share of all steps below 1, a number of steps from 1 on.
        weight_decay: on matrices; biases and norms have none.
        betas: of Adam.
        eps: of Adam.
        max_grad_norm: the gradient is scaled down to this norm, once per step.
        optimizer: "adamw", or a function of (parameter groups, learning rate).
        gradient_checkpointing: recompute activations in the backward.
        log_steps: optimiser steps per logged row.
        eval_steps: optimiser steps between evaluations; None evaluates only when `evaluate` is called.
        eval_batch_size: examples per evaluation forward at most; None is bounded by `max_tokens` alone.
        save_steps: optimiser steps between checkpoints; None saves at the end only.
        keep_checkpoints: how many of the newest stay.
        metric_for_best: evaluation metric, e.g. "loss"; decides the best checkpoint and early stopping.
            Losses, errors and divergences are to shrink, all others to grow.
        load_best: give the model the weights of the best evaluation when training ends.
        run_name: for trackers.
        report_to: names of trackers: "trackio", "wandb", "mlflow", "tensorboard", ...
        progress: where progress is shown: "auto", "terminal", "plain", "notebook", or "off".
        on_nonfinite: "raise" stops at a NaN or infinite loss or gradient; "skip" leaves the step out,
            at most ten times in a run.
        on_save_error: "raise" stops when a checkpoint cannot be written, as on a full disk; "warn" goes
            on, and tries again when the next one is due. Earlier checkpoints stay in both cases.

    Raises:
        ConfigError: a value out of range, an unknown option, or options that clash.
    """

    output_dir: str | Path | None = None
    epochs: int = 1
    max_steps: int | None = None
    learning_rate: float | None = None
    batch_size: int = 8
    max_tokens: int | None = None
    shuffle: bool = True
    seed: int = 0
    schedule: str | MakeSchedule = "linear"
    warmup: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    optimizer: str | MakeOptimizer = "adamw"
    gradient_checkpointing: bool = False
    log_steps: int = 10
    eval_steps: int | None = None
    eval_batch_size: int | None = None
    save_steps: int | None = None
    keep_checkpoints: int = 2
    metric_for_best: str | None = None
    load_best: bool = False
    run_name: str | None = None
    report_to: Sequence[str] | str | None = ()
    progress: Shown = "auto"
    on_nonfinite: OnNonFinite = "raise"
    on_save_error: OnSaveError = "raise"

    def __post_init__(self) -> None:
        self._require(_WANTED)
        self._check_effects()

    def _check_effects(self) -> None:
        """An option that would do nothing is refused."""
        own_schedule, own_optimizer = callable(self.schedule), callable(self.optimizer)
        idle = [
            ("load_best", self.eval_steps is None, "evaluations. Set eval_steps too"),
            ("metric_for_best", self.eval_steps is None, "evaluations. Set eval_steps too"),
            ("save_steps", self.output_dir is None, "a folder. Set output_dir too"),
            ("keep_checkpoints", self.output_dir is None, "a folder. Set output_dir too"),
            ("on_save_error", self.output_dir is None, "a folder. Set output_dir too"),
            ("warmup", own_schedule, "a named schedule. Put it into your function"),
            ("betas", own_optimizer, "a named optimizer. Put them into your function"),
            ("eps", own_optimizer, "a named optimizer. Put it into your function"),
        ]
        defaults = {field.name: field.default for field in fields(self)}
        for name, is_idle, without in idle:
            if is_idle and getattr(self, name) != defaults[name]:
                raise ConfigError(f"{type(self).__name__}: {name} has no effect without {without}.")

    def _require(self, wanted: Mapping[str, Wanted]) -> None:
        check(type(self).__name__, {name: (getattr(self, name), must) for name, must in wanted.items()})

    def identity(self) -> dict[str, Any]:
        """The settings that decide the weights; a resumed run must have the same."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _word(value) for name, value in named.items() if name not in _NOT_IN_THE_WEIGHTS}


_NOT_IN_THE_WEIGHTS = frozenset(
    {
        "output_dir",
        "log_steps",
        "eval_steps",
        "eval_batch_size",
        "save_steps",
        "keep_checkpoints",
        "metric_for_best",
        "load_best",
        "run_name",
        "report_to",
        "progress",
        "on_save_error",
    }
)


def _word(value: Any) -> Any:
    return getattr(value, "__qualname__", repr(value)) if callable(value) else value
