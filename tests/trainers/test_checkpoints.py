"""What a checkpoint folder holds, and which changed settings a resumed run refuses, takes or warns of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ftlib.adapters import lora
from ftlib.engine.files import load_state, save_state
from ftlib.engine.manifest import verify
from ftlib.errors import CheckpointError
from ftlib.trainers import checkpoints
from tests.models_zoo import tiny_model
from tests.trainers.runs import DATA, run, stop_after
from tests.trainers.tiny import At, rows, sft


def test_the_state_written_is_complete_and_plain(tmp_path):
    """Names of moments are names of parameters; no pickle; every file is in the manifest."""
    trainer = run(tmp_path, save_steps=2, keep_checkpoints=10).trainer
    folders = sorted(tmp_path.glob("checkpoint-*"))
    assert [folder.name[-1] for folder in folders] == ["2", "4", "6"]
    for folder in folders:
        verify(folder)
        assert {path.suffix for path in folder.iterdir()} <= {".safetensors", ".json"}
    with safe_open(folders[-1] / "optimizer.safetensors", "pt") as file:
        moments = {name.partition("/")[2] for name in file.keys()}  # noqa: SIM118  not a mapping
    assert moments == set(trainer.engine.masters.named)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_checkpoint_holds_weights_that_load_without_ftlib(tmp_path, adapter):
    trainer = run(tmp_path, adapter=adapter).trainer
    [folder] = tmp_path.glob("checkpoint-*")
    if adapter == "full":
        plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    else:
        plain = PeftModel.from_pretrained(tiny_model("llama"), str(folder))
    ids = torch.arange(5, 15)[None]
    torch.testing.assert_close(plain.eval()(ids).logits, trainer.model.eval()(ids).logits)


def test_progress_bars_of_other_libraries_do_not_appear(tmp_path, capfd):
    run(tmp_path, adapter="full", save_steps=2)
    captured = capfd.readouterr()
    assert captured.err == captured.out == ""


def test_the_newest_checkpoints_stay(tmp_path):
    run(tmp_path, save_steps=1, keep_checkpoints=2)
    assert sorted(path.name[-1] for path in tmp_path.glob("checkpoint-*")) == ["5", "6"]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(None)
    assert list(tmp_path.iterdir()) == []


CHANGES = {
    "seed": {"seed": 1},
    "batch_size": {"batch_size": 5},
    "learning_rate": {"learning_rate": 1e-2},
    "weight_decay": {"weight_decay": 0.5},
    "schedule": {"schedule": "constant"},
    "data": {"data": rows(10, seed=9)},
    "adapter": {"adapter": lora(4, alpha=1)},
    "base_weights": {"model": tiny_model("llama", seed=9)},
}


def stopped_run(folder: Path, **options) -> None:
    """Three steps an epoch, stopped after two."""
    sft(data=DATA, output_dir=folder, epochs=2, callbacks=[stop_after(2)], **options).train()


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_with_another_setting_is_refused_with_a_table(tmp_path, name):
    stopped_run(tmp_path)
    changed = sft(**({"data": DATA, "output_dir": tmp_path, "epochs": 2} | CHANGES[name]))
    with pytest.raises(CheckpointError, match=r"option +checkpoint +now\n") as caught:
        changed.train(resume=True)
    assert name in str(caught.value).replace("adapter.lora_alpha", "adapter")


def test_an_allowed_change_of_the_learning_rate_takes_effect(tmp_path):
    stopped_run(tmp_path)
    changed = sft(data=DATA, output_dir=tmp_path, epochs=2, learning_rate=1e-2, weight_decay=0.5)
    result = changed.train(resume=True, allow_changes=["learning_rate", "weight_decay"])
    rates = [row["learning_rate"] for row in result.history]
    assert rates == pytest.approx([1e-3, 1e-3 * 5 / 6, *(1e-2 * left / 6 for left in (4, 3, 2, 1))])
    assert changed.engine.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_allowed_longer_training_goes_on_with_the_longer_schedule(tmp_path):
    stopped_run(tmp_path)
    result = sft(data=DATA, output_dir=tmp_path, epochs=4).train(resume=True, allow_changes=["epochs"])
    rates = [row["learning_rate"] for row in result.history]
    assert rates == pytest.approx([1e-3, 1e-3 * 5 / 6, *(1e-3 * left / 12 for left in range(10, 0, -1))])


def test_another_machine_is_warned_of(tmp_path, monkeypatch, caplog):
    stopped_run(tmp_path)
    there = checkpoints.machine
    monkeypatch.setattr(checkpoints, "machine", lambda engine: there(engine) | {"torch": "0.1"})
    sft(data=DATA, output_dir=tmp_path, epochs=2).train(resume=True)
    assert "bit-identical results are not promised" in caplog.text


def test_memory_that_ran_out_is_remembered(tmp_path):
    """The lower `max_tokens` of the first part holds for the second: other sums round otherwise."""
    first = sft(data=DATA, output_dir=tmp_path, max_tokens=1000)
    first.engine.max_tokens = 30
    first.train()
    second = sft(data=DATA, output_dir=tmp_path, max_tokens=1000)
    second.train(resume=True)
    assert second.engine.max_tokens == 30


def end_of_run(folder: Path, written: float, **options) -> Path:
    """The last checkpoint of a whole run, as if written then."""
    before = set(folder.glob("checkpoint-*"))
    sft(data=DATA, output_dir=folder, **options).train()
    [path] = set(folder.glob("checkpoint-*")) - before
    manifest = load_state(path / "manifest.json") | {"written": written}
    save_state(path / "manifest.json", manifest)
    return path


def test_resuming_takes_the_newest_run_that_matches_and_says_which(tmp_path, caplog):
    """Four runs in one folder; the others are longer, older, or of other settings."""
    caplog.set_level("INFO")
    end_of_run(tmp_path, 1.0, max_steps=2)
    path = end_of_run(tmp_path, 2.0, max_steps=2)
    end_of_run(tmp_path, 3.0, max_steps=2, seed=1)
    end_of_run(tmp_path, 0.5, max_steps=5)
    sft(data=DATA, output_dir=tmp_path, max_steps=2).train(resume=True)
    assert f"holds checkpoints of 4 runs: going on with {path}" in caplog.text
    assert f"from {path} at step 2" in caplog.text


def test_an_allowed_change_makes_a_run_match(tmp_path):
    end_of_run(tmp_path, 1.0, max_steps=2)
    newer = end_of_run(tmp_path, 2.0, max_steps=2, seed=1)
    resumed = sft(data=DATA, output_dir=tmp_path, max_steps=2)
    resumed.train(resume=True, allow_changes=["seed"])
    assert resumed.checkpoints._resumed_from == newer


def test_where_no_run_matches_the_newest_is_refused_with_its_differences(tmp_path):
    end_of_run(tmp_path, 2.0, max_steps=2, seed=1)
    end_of_run(tmp_path, 1.0, max_steps=2, seed=2)
    with pytest.raises(CheckpointError, match=r"seed +1 +0\n"):
        sft(data=DATA, output_dir=tmp_path, max_steps=2).train(resume=True)


def test_two_runs_cannot_share_a_folder(tmp_path):
    other = sft(data=DATA, output_dir=tmp_path)
    refused = []

    def start_other(control) -> None:
        try:
            other.train()
        except CheckpointError as error:
            refused.append(str(error))

    sft(data=DATA, output_dir=tmp_path, callbacks=[At("on_step_end", 1, start_other)]).train()
    assert [f"held by process {os.getpid()}" in text for text in refused] == [True]
    assert other.train().metrics["steps"] == 3, "the folder is free again"
