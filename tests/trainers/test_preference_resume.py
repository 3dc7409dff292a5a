"""A preference run that was stopped and resumed is the run that was not, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ftlib.adapters import attach, full, lora
from ftlib.engine.manifest import newest_valid
from ftlib.errors import CheckpointError
from ftlib.models import as_reward_model
from ftlib.objectives import DPO, SFT, weighted
from ftlib.trainers import DPOTrainer, RewardTrainer, snapshot
from tests.models_zoo import tiny_model
from tests.trainers.preferences import PAIRS, UNSEEN, preference_run
from tests.trainers.runs import STEPS, Run, assert_same, stop_after

WAYS: dict[str, dict[str, Any]] = {
    "dpo": {"kind": DPOTrainer},
    "dpo of all weights": {"kind": DPOTrainer, "adapter": "full"},
    "dpo uncached": {"kind": DPOTrainer, "reference_cache": False},
    "dpo of a copy": {"kind": DPOTrainer, "reference": "copy", "loss": "ipo"},
    "dpo after a reference that moves": {"kind": DPOTrainer, "follow_every": 2, "follow_share": 0.3},
    "dpo and likelihood": {"kind": DPOTrainer, "objective": weighted({DPO(): 1.0, SFT(): 0.1})},
    "reward": {"kind": RewardTrainer},
    "reward with dropout": {"kind": RewardTrainer, "adapter": "lora dropout", "center": 0.01},
    "reward of all weights": {"kind": RewardTrainer, "adapter": "full"},
}


def run(folder: Path | None, way: str, **options: Any) -> Run:
    """One of `WAYS`; a reward model is made of what DPO trains."""
    chosen = {"adapter": "lora"} | WAYS[way] | options
    kind = chosen.pop("kind")
    if kind is RewardTrainer:
        chosen |= {"model": reward_model(chosen["adapter"])}
    return preference_run(kind, folder, **chosen)


def reward_model(adapter: str, *, seed: int = 0) -> Any:
    """The head and the adapter are drawn from `seed`, the body is always the same."""
    torch.manual_seed(seed)
    dropout = 0.2 if adapter == "lora dropout" else 0.0
    return attach(as_reward_model(tiny_model()), full() if adapter == "full" else lora(4, dropout=dropout))


@pytest.mark.parametrize("way", WAYS)
def test_stopped_at_every_step_and_continued_is_the_same_run(way: str, tmp_path: Path) -> None:
    """One trainer after the other, each stopped one step later; two epochs."""
    for step in range(1, STEPS):
        result = run(tmp_path, way, resume=True, callbacks=[stop_after(step)]).result
        assert (result.stopped_by, result.metrics["steps"]) == ("callback", step)
    found = run(tmp_path, way, resume=True)
    assert found.result.stopped_by is None
    assert_same(found, run(None, way))
    assert found.result.metrics["tokens"] == 2 * sum(row["length"] for row in PAIRS)


@pytest.mark.parametrize("way", ["dpo", "dpo of all weights"])
@pytest.mark.parametrize("fresh", [True, False], ids=["new folder", "folder of an earlier run"])
def test_with_the_references_values_in_a_folder_too(way: str, fresh: bool, tmp_path: Path) -> None:
    """Two folders of values: that of the run without a stop may not help the one with it."""
    kept = [{"reference_cache": tmp_path / name} for name in ("stopped", "whole")]
    if not fresh:
        for each in kept:
            run(None, way, seed=5, epochs=1, **each)
    run(tmp_path / "run", way, callbacks=[stop_after(2)], **kept[0])
    found = run(tmp_path / "run", way, resume=True, **kept[0])
    assert_same(found, run(None, way, **kept[1]))


@pytest.mark.parametrize("way", ["dpo", "dpo of all weights", "dpo of a copy", "dpo and likelihood"])
def test_the_reference_is_the_first_policy_though_the_resumed_one_has_moved(way: str, tmp_path: Path) -> None:
    """The negative control: without its state, the reference is what the resumed trainer began with."""
    run(tmp_path, way, callbacks=[stop_after(3)])
    [folder] = tmp_path.glob("checkpoint-*")
    assert (folder / "parts.safetensors").exists()
    found = run(tmp_path, way, resume=True, model=trained_on(WAYS[way]))
    assert_same(found, run(None, way))


def trained_on(options: dict[str, Any]) -> Any:
    """A policy under the same base weights that has learnt something else."""
    torch.manual_seed(7)
    model = attach(tiny_model(), full() if options.get("adapter") == "full" else lora(4))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape))
    return model


def test_without_the_state_of_the_reference_the_resumed_run_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, "dpo", callbacks=[stop_after(3)])
    monkeypatch.setattr(snapshot, "_restore", lambda *_: None)
    found = run(tmp_path, "dpo", resume=True, model=trained_on({}))
    expected = run(None, "dpo")
    assert not all(torch.equal(found.weights[name], value) for name, value in expected.weights.items())


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_reward_run_goes_on_in_a_process_that_drew_another_head(adapter: str, tmp_path: Path) -> None:
    """The head is new in every process, and drawn from its generator: the checkpoint's is the one."""

    def continued(folder: Path | None, seed: int, **options: Any) -> Run:
        model = reward_model(adapter, seed=seed)
        return preference_run(RewardTrainer, folder, model=model, **options)

    continued(tmp_path, 0, callbacks=[stop_after(3)])
    assert_same(continued(tmp_path, 1, resume=True), continued(None, 0))


def test_another_reference_than_that_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    options = {"allow_initial_kl": True}
    run(tmp_path, "dpo", callbacks=[stop_after(2)], reference=tiny_model(seed=1), **options)
    again = run(tmp_path, "dpo", resume=True, reference=tiny_model(seed=1), **options)
    assert_same(again, run(None, "dpo", reference=tiny_model(seed=1), **options))
    with pytest.raises(CheckpointError, match="reference"):
        run(tmp_path, "dpo", resume=True, reference=tiny_model(seed=2), **options)


@pytest.mark.parametrize("change", [{"beta": 0.2}, {"loss": "ipo"}], ids=["beta", "loss"])
def test_another_objective_than_that_of_the_checkpoint_is_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    run(tmp_path, "dpo", callbacks=[stop_after(2)])
    with pytest.raises(CheckpointError, match=f"objective.{next(iter(change))}"):
        run(tmp_path, "dpo", resume=True, **change)
    assert newest_valid(tmp_path).manifest["step"] == 2


def test_an_evaluation_on_the_way_changes_nothing(tmp_path: Path) -> None:
    """Though it asks the reference for pairs of its own."""
    found = run(tmp_path, "dpo", eval_steps=1, save_steps=1)
    for name, value in run(None, "dpo", eval_steps=None, eval_data=None).weights.items():
        assert torch.equal(found.weights[name], value), name
    assert [row for row in found.result.history if "eval_loss" in row][-1]["eval_kl"] != 0
    assert len(UNSEEN) == 3


def test_a_base_whose_weights_are_others_is_still_refused(tmp_path: Path) -> None:
    run(tmp_path, "reward", callbacks=[stop_after(2)])
    model = reward_model("lora")
    with torch.no_grad():
        model.base_model.model.model.norm.weight.mul_(1.01)
    with pytest.raises(CheckpointError, match="base_weights"):
        preference_run(RewardTrainer, tmp_path, model=model, resume=True)
