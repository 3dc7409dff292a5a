"""Supervised fine-tuning of a LoRA adapter: TRL's SFTTrainer and ftlib's.

Both get the same token ids and labels. Of TRL only public names are used; its defaults stand but for
what makes the comparison possible: `use_cpu`, `train_sampling_strategy="sequential"` on rows that are
shuffled already, `save_strategy`, `report_to`, `logging_steps`, and the optimiser settings of the
workload. Its best settings are two sides, because which is faster depends on the lengths of the rows:

- `trl-tuned`: base weights in bfloat16, no gradient checkpointing;
- `trl-flat`: the same without padding (`padding_free`), attention kept apart by a mask.

Grouping by length and packing are left out: they change which rows meet in a step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk

from benchmarks.floor import training_bytes, training_flops
from benchmarks.jobs import Evaluate, Evaluation, Prepare, Task, Train
from benchmarks.materials import ADAPTER, adapter_delta, file_sha256, write_adapters
from benchmarks.recorder import IGNORED, Recorder, Row, base_sha256, row_sha256
from benchmarks.records import Run, Workload

__all__ = ["TASK"]

MAX_LENGTH = 1024  # TRL's default, beyond which it cuts rows
HELD_OUT_SHARE = 0.1
OPTIMISER: dict[str, Any] = {"weight_decay": 0.0, "max_grad_norm": 1.0}


# -- data -----------------------------------------------------------------------------------------


def prepare(job: Prepare) -> Workload:
    """Rows and adapters, written to the job's folder.

    Raises:
        ValueError: less data than the steps need.
    """
    from transformers import AutoConfig, AutoTokenizer

    import ftlib as ft

    folder, wanted = Path(job.folder), job.steps * job.batch_size
    context = getattr(AutoConfig.from_pretrained(job.model), "max_position_embeddings", MAX_LENGTH)
    limit = min(MAX_LENGTH, context)
    encoder_options: dict[str, Any] = {"max_length": limit, "overflow": "drop"}
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
    if len(train) < wanted or not len(held_out):
        raise ValueError(
            f"expected {wanted} training rows of at most {limit} tokens and some to hold out, got "
            f"{len(train)} and {len(held_out)}. Lower --steps, or give more data."
        )
    train.save_to_disk(folder / "encoded")
    _labelled(train).save_to_disk(folder / "labelled")
    _labelled(held_out).save_to_disk(folder / "held-out")
    seeds = {"rows": job.seed, **{f"adapter {pair}": job.seed + pair for pair in range(job.pairs)}}
    sizes = write_adapters(job.model, folder, [job.seed + pair for pair in range(job.pairs)])
    steps = [_rows(train[start : start + job.batch_size]) for start in range(0, wanted, job.batch_size)]
    lengths = [[len(ids) for ids, _ in rows] for rows in steps]
    trained = [sum(label != IGNORED for _, labels in rows for label in labels) for rows in steps]
    hashes = [row_sha256(ids, labels) for rows in steps for ids, labels in rows]
    return Workload(
        data=Path(job.data).name if job.data else "docstrings of Python's standard library",
        data_sha256=hashlib.sha256("".join(hashes).encode()).hexdigest(),
        model=Path(job.model).name,
        model_sha256=file_sha256(*sorted(Path(job.model).glob("*.safetensors"))),
        rows=len(train),
        held_out=len(held_out),
        left_out=left_out,
        max_length=limit,
        batch_size=job.batch_size,
        learning_rate=job.learning_rate,
        adapter=ADAPTER,
        seeds=seeds,
        sizes=sizes,
        floor_flops=[training_flops(sizes, *step) for step in zip(lengths, trained, strict=True)],
        floor_bytes=[training_bytes(sizes, step) for step in lengths],
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


def _labelled(encoded: Dataset) -> Dataset:
    """The same rows as TRL takes them: `input_ids`, and `labels` with -100 where nothing is learned."""
    rows = _rows(encoded[:])
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
    """ftlib with its defaults. The objective is wrapped to keep the batches it was given."""
    import ftlib as ft

    encoded = load_from_disk(f"{job.folder}/encoded")
    dtype = "float32" if job.precision == "float32" else "auto"
    model, tokenizer = ft.load(job.model, adapter=job.adapter, dtype=dtype, device=job.device)
    recorder = Recorder(job.stop_after)
    kept = _KeptBatches(ft.objectives.SFT(), recorder)
    trainer = ft.SFTTrainer(
        model,
        encoded,
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
        objective=kept,
    )
    before = base_sha256(model)
    trainer.train()
    trainer.save(job.output)
    return recorder.run(job.side, job.precision, model, kept.rows(), [before, base_sha256(model)])


class _KeptBatches:
    """An objective that keeps a reference to every batch, by step, and otherwise is the one it wraps."""

    def __init__(self, objective: Any, recorder: Recorder) -> None:
        self._objective, self._recorder = objective, recorder
        self._batches: dict[int, list[Any]] = {}

    def counts(self, batch: Any) -> Any:
        return self._objective.counts(batch)

    def __call__(self, model: Any, batch: Any) -> Any:
        self._batches.setdefault(self._recorder.step, []).append(batch)
        return self._objective(model, batch)

    def rows(self) -> list[list[Row]]:
        """Ids and labels of the rows of each step."""
        steps = [self._batches[step] for step in sorted(self._batches)]
        return [[row for batch in batches for row in _unpacked(batch)] for batches in steps]


def _unpacked(batch: Any) -> list[Row]:
    """The rows of a packed batch: a token is labelled where the row before it is scored for it."""
    labels_T = torch.full_like(batch.ids_T, IGNORED)
    labels_T[batch.rows_N + 1] = batch.targets_N
    return [
        (batch.ids_T[span.start : span.stop].tolist(), labels_T[span.start : span.stop].tolist())
        for span in batch.spans
    ]


def train_trl(job: Train) -> Run:
    """TRL with its defaults."""
    return _train_trl(job, {})


def train_trl_tuned(job: Train) -> Run:
    """TRL with base weights in bfloat16 and without gradient checkpointing."""
    return _train_trl(job, {"model_init_kwargs": {"dtype": "bfloat16"}, "gradient_checkpointing": False})


def train_trl_flat(job: Train) -> Run:
    """Likewise, and without padding, for which TRL asks that it need not cut rows."""
    tuned = {"model_init_kwargs": {"dtype": "bfloat16"}, "gradient_checkpointing": False}
    return _train_trl(job, {**tuned, "padding_free": True, "max_length": None})


def _train_trl(job: Train, settings: Mapping[str, Any]) -> Run:
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    adapter = PeftConfig.from_pretrained(job.adapter)
    adapter.inference_mode = False
    precision: dict[str, Any] = {"bf16": False} if job.precision == "float32" else {}
    recorder = Recorder(job.stop_after)
    trainer: Any = SFTTrainer(
        job.model,
        args=SFTConfig(
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
            **precision,
            **settings,
        ),
        train_dataset=load_from_disk(f"{job.folder}/labelled"),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=adapter,
        callbacks=[recorder],
    )
    set_peft_model_state_dict(trainer.model, load_peft_weights(job.adapter, device=job.device))
    trainer.data_collator = kept = _KeptCollator(trainer.data_collator)
    before = base_sha256(trainer.model)
    trainer.train()
    trainer.save_model(job.output)
    rows = kept.rows()[: job.stop_after]  # the loader collates one batch ahead
    return recorder.run(job.side, job.precision, trainer.model, rows, [before, base_sha256(trainer.model)])


class _KeptCollator:
    """A collator that keeps a reference to every batch, and otherwise is the one it wraps."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator
        self._batches: list[Mapping[str, Any]] = []

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self._collator(examples)
        self._batches.append(dict(batch))
        return batch

    def rows(self) -> list[list[Row]]:
        """Ids and labels of the rows of each batch, padding left off."""
        return [_unpadded(batch) for batch in self._batches]


def _unpadded(batch: Mapping[str, Any]) -> list[Row]:
    ids_BL, labels_BL = batch["input_ids"], batch["labels"]
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(-1).tolist()
        return [
            (ids_L[:length].tolist(), labels_L[:length].tolist())
            for ids_L, labels_L, length in zip(ids_BL, labels_BL, lengths, strict=True)
        ]
    bounds = batch["cu_seq_lens_q"].tolist()
    return [
        (ids_BL[0, start:stop].tolist(), labels_BL[0, start:stop].tolist())
        for start, stop in pairwise(bounds)
    ]


# -- evaluation -----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(job: Evaluate) -> Evaluation:
    """Mean loss per trained token of the held-out rows: plain transformers and peft, float32, row by row."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
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
