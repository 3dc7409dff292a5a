"""A run that was stopped and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import pytest
import torch

from ftlib.adapters import attach, lora
from ftlib.engine import determinism
from ftlib.errors import CheckpointError, ConfigError
from ftlib.trainers import snapshot
from tests.models_zoo import tiny_model
from tests.trainers.runs import CUTS, DATA, EVAL, STEPS, WAYS, Run, assert_same, run, stop_after
from tests.trainers.tiny import At, sft, trained, without_clock

DROPOUT = WAYS["lora dropout"] | {"max_tokens": CUTS["3"]}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("way", WAYS)
def test_stopped_at_every_step_and_continued_is_the_same_run(tmp_path, way, cut, uninterrupted):
    """One trainer after the other, each stopped one step later, up to the last step."""
    options = WAYS[way] | {"max_tokens": CUTS[cut]}
    for step in range(1, STEPS):
        result = run(tmp_path, resume=True, callbacks=[stop_after(step)], **options).result
        assert (result.stopped_by, result.metrics["steps"]) == ("callback", step)
    found = run(tmp_path, resume=True, **options)
    assert found.result.stopped_by is None
    assert_same(found, uninterrupted(way, cut))
    assert found.result.metrics["tokens"] == 2 * sum(row["length"] for row in DATA)


def test_without_the_random_states_the_resumed_run_differs(tmp_path, monkeypatch, uninterrupted):
    """The negative control: the comparison above does notice."""
    run(tmp_path, callbacks=[stop_after(2)], **DROPOUT)
    monkeypatch.setattr(snapshot, "restore_rng", lambda *_: None)
    found, expected = run(tmp_path, resume=True, **DROPOUT), uninterrupted("lora dropout", "3")
    assert not all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())


def test_stopped_in_memory_and_trained_again_is_the_same_run(uninterrupted):
    """No folder; the same trainer, stopped after every step."""
    trainer = sft(epochs=2, warmup=2, log_steps=2, eval_steps=3, data=DATA, eval_data=EVAL, **DROPOUT)
    for step in range(1, STEPS):
        trainer.add_callback(At("on_step_end", step, lambda control: trainer.stop()))
    assert [trainer.train().stopped_by for _ in range(1, STEPS)] == ["stop()"] * (STEPS - 1)
    result = trainer.train()
    assert_same(Run(trainer, trained(trainer), result), uninterrupted("lora dropout", "3"))


def test_evaluating_and_saving_more_often_changes_no_weight(tmp_path, uninterrupted):
    found = run(tmp_path, **(DROPOUT | {"eval_steps": 1, "save_steps": 1, "log_steps": 1}))
    for name, value in uninterrupted("lora dropout", "3").weights.items():
        assert torch.equal(found.weights[name], value), name


def test_the_caller_finds_the_generators_as_they_were():
    """Though dropout drew from them."""
    before = determinism.capture_rng()
    run(None, **DROPOUT)
    torch.manual_seed(0)  # as `sft` did before the adapter drew its initialisation
    sft(**WAYS["lora dropout"])
    expected = torch.get_rng_state()
    torch.set_rng_state(before[0]["torch_cpu"])
    trainer = sft(**WAYS["lora dropout"])
    trainer.train()
    after = determinism.capture_rng()
    assert after[1] == before[1]
    assert torch.equal(after[0]["torch_cpu"], expected)
    assert torch.equal(after[0]["numpy_keys"], before[0]["numpy_keys"])


@pytest.mark.parametrize("name", ["mine", "default"])
def test_an_adapter_of_any_name_beside_others_checkpoints_flat_and_resumes(tmp_path, name):
    def start(folder, **options) -> Run:
        torch.manual_seed(0)
        model = attach(attach(tiny_model("llama"), lora(2), name="other"), lora(4, dropout=0.2), name=name)
        return run(folder, model=model, adapter=None, resume=folder is not None, **options)

    start(tmp_path, callbacks=[stop_after(3)])
    [folder] = tmp_path.glob("checkpoint-*")
    assert all(path.is_file() for path in folder.iterdir())
    assert (folder / "adapter_model.safetensors").exists()
    assert_same(start(tmp_path), start(None))


def test_nothing_to_resume_starts_fresh_and_says_so(tmp_path, caplog):
    assert run(tmp_path, resume=True).result.metrics["steps"] == STEPS
    assert "no checkpoint in" in caplog.text


def test_resuming_without_a_folder_is_refused():
    with pytest.raises(ConfigError, match="output_dir"):
        run(None, resume=True)


def test_a_finished_run_resumes_to_its_end(tmp_path):
    first, second = run(tmp_path), run(tmp_path, resume=True)
    assert_same(second, first)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1, "nothing new to save"


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(tmp_path, caplog, uninterrupted):
    options = DROPOUT | {"save_steps": 2, "keep_checkpoints": 10}
    run(tmp_path, **options)
    damaged = tmp_path / "checkpoint-00000006" / "train_state.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")  # of the same size
    found = run(tmp_path, resume=True, **options)
    assert str(damaged) in caplog.text
    assert_same(found, uninterrupted("lora dropout", "3"))
    with pytest.raises(CheckpointError, match=r"train_state\.safetensors"):
        run(tmp_path, resume=damaged.parent, **options)


def test_a_named_checkpoint_is_the_one_resumed_from(tmp_path, uninterrupted):
    options = DROPOUT | {"save_steps": 2, "keep_checkpoints": 10}
    run(tmp_path, **options)
    found = run(None, resume=tmp_path / "checkpoint-00000002", **DROPOUT)
    assert_same(found, uninterrupted("lora dropout", "3"))
    assert without_clock(found.result.history)[0]["step"] == 2
