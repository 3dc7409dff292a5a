"""TRL's SFTTrainer, unmodified, is a second opinion: the same losses and gradient norms, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ftlib.adapters import attach, full, lora
from ftlib.engine.files import load_state, save_state
from tests.models_zoo import tiny_model
from tests.trainers.processes import start
from tests.trainers.tiny import rows, sft

pytestmark = pytest.mark.oracle

STEPS, BATCH, RATE = 20, 4, 1e-3
ROWS = rows(20, weighted=False)  # four epochs of five batches; TRL knows no weights but 0 and 1
RELATIVE = 1e-5  # float32: padded on one side, flat on the other


def train_with_trl(folder: Path, log: Path) -> None:
    """TRL on the same rows in the same order, from the model (and adapter) saved in `folder`."""
    import trl
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if (folder / "adapter").exists():
        model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    data = [
        {
            "input_ids": row["prefix_ids"] + row["continuation_ids"][0],
            "labels": [-100] * len(row["prefix_ids"]) + row["continuation_ids"][0],
        }
        for row in ROWS
    ]
    config = trl.SFTConfig(
        output_dir=str(log.parent / "trl"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(97)}, unk_token="w3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    trainer = trl.SFTTrainer(
        model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer
    )
    trainer.train()
    save_state(log, {"rows": [row for row in trainer.state.log_history if "loss" in row]})


@pytest.mark.parametrize("way", ["full", "lora"])
def test_losses_and_gradient_norms_are_those_of_trl(tmp_path, way):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    if way == "lora":
        torch.manual_seed(0)
        model = attach(model, lora(4))
        model.save_pretrained(str(tmp_path / "adapter"))
    else:
        model = attach(model, full())
    log, errors = tmp_path / "log.json", tmp_path / "errors"
    theirs = start(train_with_trl, tmp_path, log, errors=errors)
    ours = sft(
        model=model,
        adapter=None,
        data=ROWS,
        shuffle=False,
        max_steps=STEPS,
        batch_size=BATCH,
        learning_rate=RATE,
        max_tokens=40,
    ).train()
    theirs.join(timeout=240)
    assert theirs.exitcode == 0, errors.read_text() if errors.exists() else "it hung"
    rows_of: list[dict[str, Any]] = load_state(log)["rows"]
    for name in ("loss", "grad_norm", "learning_rate"):
        expected = [row[name] for row in rows_of]
        assert [row[name] for row in ours.history] == pytest.approx(expected, rel=RELATIVE), name
    assert len(rows_of) == STEPS
    assert rows_of[-1]["loss"] < rows_of[0]["loss"] - 0.05, "something was learned"
