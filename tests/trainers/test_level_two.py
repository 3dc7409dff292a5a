"""The SFT objective in other loops, a plain one and transformers', gives the losses of the SFT trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from ftlib.data import collate
from ftlib.engine.files import load_state, save_state
from ftlib.objectives import SFT
from tests.models_zoo import tiny_model
from tests.trainers.processes import start
from tests.trainers.tiny import rows, sft

STEPS, BATCH, RATE, CLIP = 6, 4, 1e-3, 1.0
ROWS = rows(STEPS * BATCH)
RELATIVE = 1e-5


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """The trainer's losses, of all weights, in the rows' order."""
    trainer = sft(
        adapter="full", data=ROWS, shuffle=False, batch_size=BATCH, learning_rate=RATE, max_grad_norm=CLIP
    )
    return [row["loss"] for row in trainer.train().history]


def test_in_a_plain_loop(expected):
    """Two micro-batches a step; the counts are added up before the first backward."""
    model, objective = tiny_model("llama").train(), SFT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    losses = []
    for start_ in range(0, len(ROWS), BATCH):
        batches = [collate(ROWS[start_ : start_ + 3]), collate(ROWS[start_ + 3 : start_ + BATCH])]
        count = {"nll": sum(objective.counts(batch)["nll"] for batch in batches)}
        losses.append(0.0)
        for batch in batches:
            loss = objective(model, batch).loss(count)
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert losses == pytest.approx(expected, rel=RELATIVE)


def train_with_transformers(folder: Path) -> None:
    """`transformers.Trainer` whose compute_loss is the objective."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    objective = SFT()

    class Ours(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return objective(model, inputs["batch"]).loss(objective.counts(inputs["batch"]))

    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        max_grad_norm=CLIP,
        train_sampling_strategy="sequential",
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    data = Dataset.from_list([{"row": json.dumps(row)} for row in ROWS])
    trainer = Ours(
        tiny_model("llama"),
        arguments,
        train_dataset=data,
        data_collator=lambda examples: {"batch": collate([json.loads(each["row"]) for each in examples])},
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    save_state(folder / "log.json", {"losses": losses})


@pytest.mark.oracle
def test_in_the_trainer_of_transformers(tmp_path, expected):
    errors = tmp_path / "errors"
    process = start(train_with_transformers, tmp_path, errors=errors)
    process.join(timeout=120)
    assert process.exitcode == 0, errors.read_text() if errors.exists() else "it hung"
    assert load_state(tmp_path / "log.json")["losses"] == pytest.approx(expected, rel=RELATIVE)
