"""Supervised fine-tuning of a LoRA adapter: TRL's SFTTrainer and ftlib's.

Both get the same token ids and labels. TRL's best settings are two sides, because which is faster
depends on the lengths of the rows:

- `trl-tuned`: base weights in bfloat16 where the processor has it, else float32 without autocast; no gradient
  checkpointing;
- `trl-flat`: the same without padding (`padding_free`), attention kept apart by a mask.

Grouping by length and packing are left out: they change which rows meet in a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk

from benchmarks.jobs import Evaluate, Evaluation, Prepare, Task, Train
from benchmarks.materials import Rows, adapter_delta, load_plain, longest, workload
from benchmarks.recorder import IGNORED, Example, Row
from benchmarks.records import Run, Workload
from benchmarks.sides import examples_of, run_ftlib, run_trl, saved, tuned

__all__ = ["TASK"]

HELD_OUT_SHARE = 0.1


# -- data -----------------------------------------------------------------------------------------


def prepare(job: Prepare) -> Workload:
    """Rows and adapters, written to the job's folder.

    Raises:
        ValueError: less data than the steps need.
    """
    from transformers import AutoTokenizer

    import ftlib as ft

    folder, wanted = Path(job.folder), job.steps * job.batch_size
    encoder_options: dict[str, Any] = {"max_length": longest(job.model), "overflow": "drop"}
    chosen, left_out = [], 0
    for records, count in zip(_records(job.data), (wanted, job.held_out), strict=True):
        if "completion" in records.column_names:
            encoder_options["formatter"] = ft.formatters.prompt_completion(separator="\n")
        # twice the rows that are needed: some may be too long
        some = records.shuffle(seed=job.seed).select(range(min(2 * count, len(records))))
        encoder = ft.Encoder(AutoTokenizer.from_pretrained(job.model), **encoder_options)
        encoded = encoder(some)
        left_out += len(some) - len(encoded)
        chosen.append(encoded.select(range(min(count, len(encoded)))))
    train, held_out = chosen
    rows = _rows(train[:])
    train.save_to_disk(folder / "encoded")
    _labelled(rows).save_to_disk(folder / "labelled")
    _labelled(_rows(held_out[:])).save_to_disk(folder / "held-out")
    return workload(
        job,
        Rows(
            examples=[(row,) for row in rows],
            lengths=[(0, len(ids)) for ids, _ in rows],
            unit="rows",
            held_out=len(held_out),
            left_out=left_out,
        ),
    )


def _records(data: str) -> tuple[Dataset, Dataset]:
    """Training records and records to hold out. Of preference pairs the chosen completion is learned."""
    import ftlib as ft
    from ftlib.demo.corpora import docstring_pairs, split_pairs

    if not data:
        train, held_out = split_pairs(docstring_pairs(), validation=HELD_OUT_SHARE)
        return ft.load_records(train), ft.load_records(held_out)
    names = ft.load_records(data, format="rows").column_names
    pairs = "chosen" in names and "completion" not in names
    records = ft.load_records(data, columns={"completion": "chosen"} if pairs else None)
    train_records, held_out_records = ft.split(records, validation=HELD_OUT_SHARE)
    return train_records, held_out_records


def _labelled(rows: Sequence[Row]) -> Dataset:
    """Rows as TRL takes them: `input_ids`, and `labels` with -100 where nothing is learned."""
    return Dataset.from_list([{"input_ids": list(ids), "labels": list(labels)} for ids, labels in rows])


def _rows(columns: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Ids and labels of encoded examples.

    Raises:
        ValueError: a loss weight that is neither 0 nor 1, which a label cannot express.
    """
    rows: list[Row] = []
    for prefix, prefix_weights, (rest,), (rest_weights,) in zip(
        columns["prefix_ids"],
        columns["prefix_weights"],
        columns["continuation_ids"],
        columns["continuation_weights"],
        strict=True,
    ):
        ids, weights = [*prefix, *rest], [0.0, *[*prefix_weights, *rest_weights][1:]]
        if not set(weights) <= {0.0, 1.0}:
            raise ValueError(f"expected loss weights of 0 or 1, got {sorted(set(weights))}.")
        rows.append((ids, [token if weight else IGNORED for token, weight in zip(ids, weights, strict=True)]))
    return rows


# -- sides ----------------------------------------------------------------------------------------


def train_ftlib(job: Train) -> Run:
    """ftlib with its defaults."""
    import ftlib as ft

    return run_ftlib(job, ft.SFTTrainer, examples_of)


def train_trl(job: Train) -> Run:
    """TRL with its defaults."""
    return _train_trl(job, {})


def train_trl_tuned(job: Train) -> Run:
    """TRL in the precision that is fast here, without gradient checkpointing."""
    return _train_trl(job, tuned(job))


def train_trl_flat(job: Train) -> Run:
    """Likewise, and without padding, for which TRL asks that it need not cut rows."""
    return _train_trl(job, {**tuned(job), "padding_free": True, "max_length": None})


def _train_trl(job: Train, settings: Mapping[str, Any]) -> Run:
    from trl import SFTConfig, SFTTrainer

    return run_trl(job, SFTTrainer, SFTConfig, saved(job, "labelled"), _unpadded, settings)


def _unpadded(batch: Mapping[str, Any]) -> list[Example]:
    ids_BL, labels_BL = batch["input_ids"], batch["labels"]
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(-1).tolist()
        return [
            ((ids_L[:length].tolist(), labels_L[:length].tolist()),)
            for ids_L, labels_L, length in zip(ids_BL, labels_BL, lengths, strict=True)
        ]
    bounds = batch["cu_seq_lens_q"].tolist()
    return [
        ((ids_BL[0, start:stop].tolist(), labels_BL[0, start:stop].tolist()),)
        for start, stop in pairwise(bounds)
    ]


# -- evaluation -----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(job: Evaluate) -> Evaluation:
    """Mean loss per trained token of the held-out rows: plain transformers and peft, float32, row by row."""
    from peft import PeftModel

    base = load_plain(job.model)
    rows = load_from_disk(f"{job.folder}/held-out")
    losses, deltas = {}, {}
    for name, folder in job.adapters.items():
        model = PeftModel.from_pretrained(base, folder).eval()
        total, count = 0.0, 0
        for row in rows:
            ids_1L, labels_L = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
            logprobs_LV = model(input_ids=ids_1L, use_cache=False).logits[0, :-1].log_softmax(-1)
            trained_L = labels_L != IGNORED
            picked_N = logprobs_LV[trained_L].gather(-1, labels_L[trained_L][:, None])
            total, count = total - float(picked_N.double().sum()), count + len(picked_N)
        losses[name] = total / count
        deltas[name] = adapter_delta(Path(folder), Path(job.initial[name]))
        base = model.unload()
    return Evaluation(losses, deltas)


TASK = Task(
    prepare=prepare,
    sides={"ftlib": train_ftlib, "trl": train_trl, "trl-tuned": train_trl_tuned, "trl-flat": train_trl_flat},
    evaluate=evaluate,
)
