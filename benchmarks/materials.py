"""What every task prepares: adapter initialisations, the model's sizes, the description of the workload."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from benchmarks.floor import forward_bytes, forward_flops, training_bytes, training_flops
from benchmarks.jobs import Prepare, adapter_folder
from benchmarks.recorder import IGNORED, Example, example_sha256
from benchmarks.records import Workload

__all__ = ["ADAPTER", "Rows", "adapter_delta", "load_plain", "longest", "workload"]

ADAPTER: dict[str, Any] = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
WEIGHTS = "adapter_model.safetensors"
MAX_LENGTH = 1024  # tokens of a sequence: TRL's default, beyond which it cuts or drops


@dataclass(frozen=True)
class Rows:
    """What was made of the data: the training examples, and what happened to the others.

    Args:
        examples: ids and labels, in order, as both sides must hold them.
        lengths: of each example, tokens of its prefix and of each continuation.
        unit: what one example is called, in the plural.
        held_out, left_out, differing: see `Workload`.
    """

    examples: Sequence[Example]
    lengths: Sequence[Sequence[int]]
    unit: str
    held_out: int
    left_out: int
    differing: int = 0


def longest(model: str) -> int:
    """Most tokens of one sequence that both sides take."""
    context = getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", None)
    return min(MAX_LENGTH, context or MAX_LENGTH)


def workload(
    job: Prepare, rows: Rows, *, task: TaskType = TaskType.CAUSAL_LM, starts_at: float | None = None
) -> Workload:
    """Write one adapter initialisation per pair of runs, and describe what is trained.

    Args:
        task: peft's; sequence classification stands for a score head.
        starts_at: the loss of the first step, known because a reference equals the policy then: one
            more forward of every example, in the first epoch.

    Raises:
        ValueError: less data than the steps need.
    """
    wanted = job.steps * job.batch_size
    if len(rows.examples) < wanted or not rows.held_out:
        raise ValueError(
            f"expected {wanted} training {rows.unit} of at most {longest(job.model)} tokens and some to hold "
            f"out, got {len(rows.examples)} and {rows.held_out}. Lower --steps, or give more data."
        )
    sizes = _write_adapters(job, task)
    flops, moved = [], []
    for start in range(0, wanted, job.batch_size):
        step = slice(start, start + job.batch_size)
        lengths = rows.lengths[step]
        scored = sum(
            label != IGNORED for example in rows.examples[step] for _, labels in example for label in labels
        )
        training = training_flops(sizes, lengths, scored), training_bytes(sizes, lengths)
        reference = forward_flops(sizes, lengths, scored), forward_bytes(sizes)
        flops.append((training[0], reference[0] if starts_at is not None else 0.0))
        moved.append((training[1], reference[1] if starts_at is not None else 0.0))
    hashes = "".join(map(example_sha256, rows.examples))
    return Workload(
        data=Path(job.data).name if job.data else "docstrings of Python's standard library",
        data_sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        model=Path(job.model).name,
        model_sha256=_files_sha256(sorted(Path(job.model).glob("*.safetensors"))),
        unit=rows.unit,
        rows=len(rows.examples),
        held_out=rows.held_out,
        left_out=rows.left_out,
        differing=rows.differing,
        max_length=longest(job.model),
        batch_size=job.batch_size,
        epochs=job.epochs,
        starts_at=starts_at,
        learning_rate=job.learning_rate,
        adapter=ADAPTER,
        seeds={"rows": job.seed, **{f"adapter {pair}": job.seed + pair for pair in range(job.pairs)}},
        sizes=sizes,
        floor_flops=_of_epochs(flops, job.epochs),
        floor_bytes=_of_epochs(moved, job.epochs),
    )


def _of_epochs(steps: Sequence[tuple[float, float]], epochs: int) -> list[float]:
    """Of every step: its own work, and what only the first epoch needs."""
    later = [own for own, _ in steps] * (epochs - 1)
    return [own + once for own, once in steps] + later


def load_plain(model: str, task: TaskType = TaskType.CAUSAL_LM) -> Any:
    """The base model in float32, by transformers alone; a score head is new, drawn from the global seed."""
    if task == TaskType.SEQ_CLS:
        return AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32, num_labels=1)
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def _write_adapters(job: Prepare, task: TaskType) -> dict[str, int]:
    """One initialisation per pair of runs, in peft's format; a score head belongs to it.

    Returns:
        Sizes of the model: weights in the `body`'s matrices, in its `head`, in the `adapter`; `layers`,
        `hidden` width and `attention` = heads x head_dim.
    """
    sizes: dict[str, int] = {}
    for pair in range(job.pairs):
        torch.manual_seed(job.seed + pair)
        base = load_plain(job.model, task)
        sizes = sizes or _sizes(base)
        model = get_peft_model(base, LoraConfig(task_type=task, **ADAPTER))
        sizes["adapter"] = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        model.save_pretrained(str(adapter_folder(Path(job.folder), pair)))
    return sizes


def _sizes(base: Any) -> dict[str, int]:
    head = base.get_output_embeddings() or base.score
    matrices = [module for module in base.modules() if isinstance(module, nn.Linear | Conv1D)]
    text = base.config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {
        "body": sum(module.weight.numel() for module in matrices if module is not head),
        "head": head.weight.numel(),
        "layers": text.num_hidden_layers,
        "hidden": text.hidden_size,
        "attention": text.num_attention_heads * head_dim,
    }


def adapter_delta(folder: Path, initial: Path) -> float:
    """Euclidean distance of a saved adapter from its initialisation.

    Raises:
        ValueError: they do not hold the same tensors.
    """
    after, before = load_file(folder / WEIGHTS), load_file(initial / WEIGHTS)
    if _shapes(after) != _shapes(before):
        raise ValueError(f"{folder}: expected the tensors of {initial}, got others: {sorted(after)[:3]} ...")
    squares = [(after[name].double() - before[name].double()).square().sum() for name in before]
    return float(torch.stack(squares).sum().sqrt())


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _files_sha256(files: Sequence[Path]) -> str:
    """Of the contents of some files, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
