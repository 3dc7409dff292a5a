"""One training run of either library, whatever the task: same rows, same start, same optimiser.

Of TRL only public names are used, and its defaults stand but for what makes a comparison possible:
`use_cpu`, `train_sampling_strategy="sequential"` on rows that are shuffled already, `save_strategy`,
`report_to`, `logging_steps`, and the optimiser settings of the workload. ftlib runs with its defaults
and the same settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.jobs import Train
from benchmarks.recorder import IGNORED, Example, Recorder, base_sha256
from benchmarks.records import Run

__all__ = ["examples_of", "fast_dtype", "run_ftlib", "run_trl", "saved", "tuned"]

OPTIMISER: dict[str, Any] = {"weight_decay": 0.0, "max_grad_norm": 1.0}

Unpack = Callable[[Any], list[Example]]  # a batch of one side to the examples it holds


def saved(job: Train, name: str) -> Dataset:
    """A data set that `prepare` left, in memory, so that nothing derived from it outlives the process."""
    rows = load_from_disk(f"{job.folder}/{name}", keep_in_memory=True)
    assert isinstance(rows, Dataset)
    return rows


def fast_dtype(job: Train) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32: emulated bfloat16 is slower."""
    from ftlib.models.precision import bf16_is_fast

    fast, _ = bf16_is_fast(torch.device(job.device))
    return torch.bfloat16 if fast else torch.float32


def tuned(job: Train) -> dict[str, Any]:
    """TRL's best settings for every task: nothing computed twice, in the precision that is fast here.

    Base weights in that precision, and autocast only where it is bfloat16.
    """
    dtype = fast_dtype(job)
    return {
        "model_init_kwargs": {"dtype": str(dtype).removeprefix("torch.")},
        "bf16": dtype == torch.bfloat16,
        "gradient_checkpointing": False,
    }


def run_ftlib(job: Train, make_trainer: Callable[..., Any], unpack: Unpack, task: str = "causal_lm") -> Run:
    """ftlib on the data set "encoded". A hook on the model keeps the batches that it is given.

    Args:
        make_trainer: a trainer's class, perhaps with options of its own bound to it.
        unpack: a packed batch to its examples.
        task: of `ft.load`.
    """
    import ftlib as ft

    dtype = "float32" if job.precision == "float32" else "auto"
    model, tokenizer = ft.load(job.model, adapter=job.adapter, task=task, dtype=dtype, device=job.device)
    recorder = Recorder(job.stop_after)
    trainer = make_trainer(
        model,
        saved(job, "encoded"),
        tokenizer=tokenizer,
        config=ft.TrainConfig(
            max_steps=job.steps,
            batch_size=job.batch_size,
            learning_rate=job.learning_rate,
            shuffle=False,
            schedule="linear",
            warmup=0.0,
            log_steps=1,
            **OPTIMISER,
        ),
        callbacks=[recorder],
    )
    recorder.built()
    kept = _kept_batches(trainer.engine.scorer, recorder)
    before = base_sha256(model)
    recorder.starting()
    trainer.train()
    trainer.save(job.output)
    examples = [[example for batch in kept[step] for example in unpack(batch)] for step in sorted(kept)]
    return recorder.run(job.side, job.precision, model, examples, [before, base_sha256(model)])


def _kept_batches(scorer: nn.Module, recorder: Recorder) -> dict[int, list[Any]]:
    """By step, every batch that has a gradient; a reference's forwards have none."""
    kept: dict[int, list[Any]] = {}

    def keep(_scorer: nn.Module, arguments: tuple[Any, ...]) -> None:
        if recorder.stepping and torch.is_grad_enabled():
            kept.setdefault(recorder.step, []).append(arguments[0])

    scorer.register_forward_pre_hook(keep)
    return kept


def examples_of(batch: Any) -> list[Example]:
    """The examples of a packed batch, one row per continuation; a token is labelled where it is scored."""
    examples: list[Example] = []
    owner = 0
    for span in batch.spans:
        rows = []
        end = span.start + span.prefix
        for length in span.continuations:
            ids_L = torch.cat(
                [batch.ids_T[span.start : span.start + span.prefix], batch.ids_T[end : end + length]]
            )
            labels_L = torch.full_like(ids_L, IGNORED)
            mine_N = batch.owner_N == owner
            labels_L[batch.positions_T[batch.rows_N[mine_N]] + 1] = batch.targets_N[mine_N]
            rows.append((ids_L.tolist(), labels_L.tolist()))
            end, owner = end + length, owner + 1
        examples.append(rows)
    return examples


def run_trl(
    job: Train,
    trainer_class: Callable[..., Any],
    config_class: Callable[..., Any],
    data: Dataset,
    unpack: Unpack,
    settings: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Run:
    """TRL on `data`. Its collator is wrapped to keep the batches it made.

    Args:
        unpack: a collated batch to its examples, padding left off.
        settings: of `config_class`, beside those that every task shares.
        tokenizer: in place of the model's.
    """
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

    adapter = PeftConfig.from_pretrained(job.adapter)
    adapter.inference_mode = False
    precision: dict[str, Any] = {"bf16": False} if job.precision == "float32" else {}
    recorder = Recorder(job.stop_after)
    trainer = trainer_class(
        job.model,
        args=config_class(
            output_dir=f"{job.output}-trainer",
            use_cpu=job.device == "cpu",
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            logging_steps=1,
            max_steps=job.steps,
            per_device_train_batch_size=job.batch_size,
            learning_rate=job.learning_rate,
            **OPTIMISER,
            **{**settings, **precision},
        ),
        train_dataset=data,
        processing_class=tokenizer or AutoTokenizer.from_pretrained(job.model),
        peft_config=adapter,
        callbacks=[recorder],
    )
    recorder.built()
    set_peft_model_state_dict(trainer.model, load_peft_weights(job.adapter, device=job.device))
    trainer.data_collator = kept = _KeptCollator(trainer.data_collator)
    before = base_sha256(trainer.model)
    recorder.starting()
    trainer.train()
    trainer.save_model(job.output)
    held = kept.batches[: job.stop_after]  # the loader collates one batch ahead
    hashes = [before, base_sha256(trainer.model)]
    return recorder.run(job.side, job.precision, trainer.model, list(map(unpack, held)), hashes)


class _KeptCollator:
    """A collator that keeps a reference to every batch, and otherwise is the one it wraps."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator
        self.batches: list[Mapping[str, Any]] = []

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self._collator(examples)
        self.batches.append(dict(batch))
        return batch
