"""An objective with a state of its own: it goes into checkpoints and comes back bit for bit."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from ftlib.batches import LossOutput, Mean
from ftlib.engine.manifest import newest_valid
from ftlib.errors import CheckpointError
from ftlib.objectives import SFT
from ftlib.trainers import SFTTrainer, snapshot
from tests.trainers.runs import DATA, STEPS, assert_same, run, stop_after
from tests.trainers.tiny import rows

NOT_A_NUMBER = 0x7FC1  # of the many bfloat16 ones: its payload must survive too


@dataclass
class Moving:
    """SFT whose loss is scaled by a number that moves after every step, and a count of the moves."""

    scale: Tensor = field(default_factory=lambda: torch.ones(()))
    bits: Tensor = field(default_factory=lambda: torch.tensor([1, NOT_A_NUMBER], dtype=torch.int16))
    moves: int = 0
    power: int = 1  # a setting: it never moves

    def counts(self, batch):
        return SFT().counts(batch)

    def __call__(self, model, batch):
        [mean] = SFT()(model, batch).terms.values()
        return LossOutput({"nll": Mean(self.scale**self.power * mean.sum, mean.count)})

    def move(self) -> None:
        self.scale = self.scale / 3 + 1
        self.bits += 1
        self.moves += 1

    def state_dict(self):
        return {"scale": self.scale, "bits": self.bits.view(torch.bfloat16), "moves": self.moves}

    def load_state_dict(self, state):
        self.scale, self.moves = state["scale"], state["moves"]
        self.bits = state["bits"].view(torch.int16)


@pytest.fixture
def moved(monkeypatch):
    """Makes every step of a trainer move its objective, as a moving reference would."""
    step = SFTTrainer.step

    def step_and_move(self, batch):
        row = step(self, batch)
        self.engine.objective.move()
        return row

    monkeypatch.setattr(SFTTrainer, "step", step_and_move)


@pytest.mark.usefixtures("moved")
def test_stopped_at_every_step_and_continued_is_the_same_run(tmp_path):
    for step in range(1, STEPS):
        run(tmp_path, resume=True, objective=Moving(), callbacks=[stop_after(step)])
    found, expected = run(tmp_path, resume=True, objective=Moving()), run(None, objective=Moving())
    assert_same(found, expected)
    ours, theirs = found.trainer.engine.objective, expected.trainer.engine.objective
    assert ours.moves == theirs.moves == STEPS
    assert torch.equal(ours.scale, theirs.scale)
    assert ours.bits.tolist() == theirs.bits.tolist() == [1 + STEPS, NOT_A_NUMBER + STEPS]


@pytest.mark.usefixtures("moved")
def test_without_its_state_the_resumed_run_differs(tmp_path, monkeypatch):
    """The negative control: the comparison above does notice."""
    monkeypatch.setattr(Moving, "load_state_dict", lambda self, state: None)
    run(tmp_path, objective=Moving(), callbacks=[stop_after(2)])
    found, expected = run(tmp_path, resume=True, objective=Moving()), run(None, objective=Moving())
    assert not all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())


def test_tensors_are_in_safetensors_and_values_in_json(tmp_path):
    run(tmp_path, objective=Moving(moves=7))
    folder = newest_valid(tmp_path).path
    assert json.loads((folder / "state.json").read_text())["parts"] == {"objective": {"moves": 7}}
    tensors = snapshot.load_tensors(folder / "parts.safetensors")
    assert {name: value.dtype for name, value in tensors.items()} == {
        "objective/scale": torch.float32,
        "objective/bits": torch.bfloat16,
    }


def test_an_objective_without_a_state_adds_no_file(tmp_path):
    run(tmp_path)
    assert not (newest_valid(tmp_path).path / "parts.safetensors").exists()


def test_a_checkpoint_of_before_there_were_parts_is_read_and_said_to_lack_them(tmp_path, monkeypatch, caplog):
    save_state, options = snapshot.save_state, {"data": DATA, "eval_data": rows(2)}

    def without_parts(path, state):
        save_state(path, {name: value for name, value in state.items() if name != "parts"})

    monkeypatch.setattr(snapshot, "save_state", without_parts)
    monkeypatch.setattr(snapshot, "_state_of", lambda parts: ({}, {}))
    run(tmp_path, objective=Moving(), callbacks=[stop_after(2)], **options)
    monkeypatch.undo()
    resumed = Moving(moves=5)
    assert run(tmp_path, resume=True, objective=resumed, **options).result.metrics["steps"] == STEPS
    assert resumed.moves == 5
    assert "holds no state of 'objective'" in caplog.text


@pytest.mark.usefixtures("moved")
def test_what_moves_is_no_setting_and_what_does_not_is_one(tmp_path):
    run(tmp_path, objective=Moving(), callbacks=[stop_after(2)])
    with pytest.raises(CheckpointError, match=r"objective\.power") as caught:
        run(tmp_path, resume=True, objective=Moving(power=2))
    assert "objective.moves" not in str(caught.value)


def test_a_state_that_nothing_takes_is_named(tmp_path, caplog):
    run(tmp_path, objective=Moving(), callbacks=[stop_after(2)])
    caplog.set_level("INFO")
    trainer = run(None, max_steps=1).trainer  # settings alone
    assert trainer.stateful_parts() == {}
    snapshot.read(newest_valid(tmp_path).path, trainer.engine, trainer.sampler, {}, changed=False)
    assert "remembers the state of 'objective', which this run does not use" in caplog.text
