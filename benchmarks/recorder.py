"""What is recorded while a side trains: times, losses, resources, and the examples its batches held.

Both sides carry the same `TrainerCallback`. In the timed region it reads a clock and keeps references;
everything else happens after training.
"""

from __future__ import annotations

import hashlib
import math
import os
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.records import Run, Step

__all__ = ["IGNORED", "Example", "Recorder", "Row", "base_sha256", "example_sha256"]

IGNORED = -100  # the label of a token that is not trained
Row = tuple[Sequence[int], Sequence[int]]  # ids and labels
Example = Sequence[Row]  # one row, or those of a pair: the chosen one, then the rejected one


class Recorder(TrainerCallback):
    """Times, losses and resources of one run, which it ends after some steps.

    Args:
        stop_after: steps to take.
    """

    def __init__(self, stop_after: int) -> None:
        self._stop_after = stop_after
        self.stepping = False
        self.seconds: list[float] = []
        self.inside: list[float] = []
        self.logs: list[Mapping[str, float]] = []
        self._last = self._began = 0.0
        self._ahead = self._ready = 0.0
        self._start = self._end = resource.getrusage(resource.RUSAGE_SELF)
        self._peak = 0

    def on_init_end(self, *_args: Any, **_kwargs: Any) -> None:
        self._ready = time.perf_counter()

    def built(self) -> None:
        """To be called when the trainer stands: what it did after `on_init_end` was done ahead."""
        self._ahead = time.perf_counter() - self._ready

    def starting(self) -> None:
        """To be called before the trainer trains: what it does until its first step is done ahead."""
        self._ready = time.perf_counter()

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        if not self._last:
            self._ahead += time.perf_counter() - self._ready
            self._start = resource.getrusage(resource.RUSAGE_SELF)
            self._last = time.perf_counter()
        self.stepping = True
        self._began = time.perf_counter()

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002  the protocol's names
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **_kwargs: Any,
    ) -> None:
        now = time.perf_counter()
        self.stepping = False
        self.seconds.append(now - self._last)
        self.inside.append(now - self._began)
        self._last = now
        if self.step == self._stop_after:
            control.should_training_stop = True

    def on_log(self, *_args: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs and "grad_norm" in logs:
            self.logs.append(dict(logs))

    def on_train_end(self, *_args: Any, **_kwargs: Any) -> None:
        self._end = resource.getrusage(resource.RUSAGE_SELF)
        self._peak = _peak_bytes()

    @property
    def step(self) -> int:
        """Steps ended so far: the index of the one under way."""
        return len(self.seconds)

    def run(
        self,
        side: str,
        precision: str,
        model: nn.Module,
        examples: Sequence[Sequence[Example]],
        base: list[str],
    ) -> Run:
        """The record of the run that has ended.

        Args:
            model: to read the dtype of its frozen matrices.
            examples: those of each step, as the side's batches held them.
            base: hashes of the base weights, before and after.

        Raises:
            ValueError: steps, logs and batches that differ in number, or a loss that is not finite.
        """
        if not len(self.seconds) == len(self.logs) == len(examples):
            raise ValueError(
                f"{side}: expected as many logs and batches as steps, got {len(self.seconds)} steps, "
                f"{len(self.logs)} logs, {len(examples)} batches."
            )
        steps = [
            Step(
                seconds=seconds,
                inside_seconds=inside,
                loss=float(log["loss"]),
                grad_norm=float(log["grad_norm"]),
                tokens=sum(len(ids) for example in held for ids, _ in example),
                trained_tokens=sum(
                    label != IGNORED for example in held for _, labels in example for label in labels
                ),
                rows_sha256=examples_sha256(held),
            )
            for seconds, inside, log, held in zip(self.seconds, self.inside, self.logs, examples, strict=True)
        ]
        wild = [
            number for number, step in enumerate(steps, 1) if not math.isfinite(step.loss + step.grad_norm)
        ]
        if wild:
            raise ValueError(f"{side}: expected finite losses and gradients, got others in steps {wild}.")
        start, end = self._start, self._end
        return Run(
            label=side,
            side=side,
            pair=0,
            precision=precision,
            environment={},
            threads=torch.get_num_threads(),
            weights_dtype=str(next(weight.dtype for _, weight in _base(model) if weight.ndim == 2)),
            steps=steps,
            peak_bytes=self._peak,
            user_seconds=end.ru_utime - start.ru_utime,
            system_seconds=end.ru_stime - start.ru_stime,
            minor_faults=end.ru_minflt - start.ru_minflt,
            major_faults=end.ru_majflt - start.ru_majflt,
            involuntary_switches=end.ru_nivcsw - start.ru_nivcsw,
            wall_seconds=sum(self.seconds),
            ahead_seconds=self._ahead,
            base_sha256=base,
        )


def _peak_bytes() -> int:
    """Most resident memory of this process so far.

    From the process's own memory map where the system shows it: `ru_maxrss` of a fresh process starts at
    what its parent held.
    """
    status = Path(f"/proc/{os.getpid()}/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def row_sha256(ids: Sequence[int], labels: Sequence[int]) -> str:
    """Of one row. The first label is left out: nothing predicts the first token."""
    digest = hashlib.sha256()
    for values in (ids, [IGNORED, *labels[1:]]):
        digest.update(torch.tensor(list(values), dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()


def example_sha256(example: Example) -> str:
    """Of one example, its rows in order."""
    return _joined_sha256(row_sha256(ids, labels) for ids, labels in example)


def examples_sha256(examples: Sequence[Example]) -> str:
    """Of the examples of one step, whatever their order within it."""
    return _joined_sha256(sorted(map(example_sha256, examples)))


def _joined_sha256(hashes: Iterable[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _base(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return sorted(
        (name, weight)
        for name, weight in model.named_parameters()
        if "lora_" not in name and "modules_to_save" not in name
    )


def base_sha256(model: nn.Module) -> str:
    """Of every weight that does not belong to the adapter, bit by bit."""
    digest = hashlib.sha256()
    for name, weight in _base(model):
        digest.update(name.encode())
        digest.update(weight.detach().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
