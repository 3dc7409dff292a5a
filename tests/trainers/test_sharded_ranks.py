"""Two gloo processes that keep half of every weight are one process: losses, gradients, weights, files.

accelerate shards on GPUs alone, so these tests tell it that this is what it was asked for; the rest, from
`fully_shard` on a mesh of CPUs to the files, is what runs there.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from ftlib.adapters import lora
from ftlib.engine.files import load_state, load_tensors, save_state, save_tensors
from ftlib.engine.manifest import newest_valid
from ftlib.errors import CapabilityError
from ftlib.trainers import DPOTrainer, RewardTrainer
from tests.trainers.ppo_tiny import ppo as ppo_trainer
from tests.trainers.preferences import pairs, preference_trainer
from tests.trainers.processes import ranks
from tests.trainers.runs import run, stop_after
from tests.trainers.tiny import rows, sft, without_clock

RELATIVE = 1e-5  # float32: sums taken in another order
SHARES: dict[str, dict[str, Any]] = {
    "lora": {"data": rows(8), "max_tokens": 22},
    "all weights": {"data": rows(8), "max_tokens": 30, "adapter": "full"},
    "fewer examples than ranks": {"data": rows(1)},
    "checkpointed layers": {"data": rows(8), "max_tokens": 30, "gradient_checkpointing": True},
    "bfloat16 base": {"data": rows(8), "dtype": torch.bfloat16},
    "bfloat16 with masters": {"data": rows(8), "max_tokens": 30, "adapter": "full", "dtype": torch.bfloat16},
    "reward": {"kind": RewardTrainer, "data": pairs(8), "max_tokens": 60},
    "dpo": {"kind": DPOTrainer, "data": pairs(8), "max_tokens": 60},
}


def ask_for_fsdp(**options: Any) -> None:
    """Let every engine of this process shard, as on several GPUs."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, **options)
    Accelerator().state.fsdp_plugin = plugin


def trainer_of(share: str, **options: Any) -> Any:
    options = SHARES[share] | options
    return preference_trainer(**options) if "kind" in options else sft(**options)


def whole_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Of every rank's pieces; every one takes part."""
    copies = trainer.engine.masters.copies()
    return {n: w.full_tensor() if isinstance(w, DTensor) else w for n, w in copies.items()}


def three_steps(share: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Logged rows and weights; gradient descent with momentum, whose steps are linear in the gradient."""
    trainer = trainer_of(share, optimizer=lambda groups, rate: torch.optim.SGD(groups, 0.05, 0.9))
    logged = [trainer.step(SHARES[share]["data"]) for _ in range(3)]
    return [*logged, trainer.evaluate(SHARES[share]["data"])], whole_weights(trainer)


def three_steps_on_a_rank(rank: int, share: str, folder: Path) -> None:
    ask_for_fsdp()
    logged, weights = three_steps(share)
    save_state(folder / f"{rank}.json", {"rows": logged})
    save_tensors(folder / f"{rank}.safetensors", weights)


@pytest.mark.parametrize("share", SHARES)
def test_two_sharded_ranks_are_one_process(tmp_path: Path, share: str) -> None:
    ranks(three_steps_on_a_rank, share, tmp_path, folder=tmp_path)
    logged, weights = three_steps(share)
    relative = 2e-2 if share.startswith("bfloat16") else RELATIVE  # rows are cut otherwise, and round
    for rank in range(2):
        found = load_state(tmp_path / f"{rank}.json")["rows"]
        for row, expected in zip(found, logged, strict=True):
            assert row == pytest.approx(expected, rel=relative, abs=relative)
    first, second = (load_tensors(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=relative * float(value.abs().max()))


def pieces_on_a_rank(rank: int, folder: Path) -> None:
    ask_for_fsdp()
    trainer = sft(data=rows(8))
    seen: dict[str, Any] = {}
    model, layer = trainer.engine.scorer, trainer.model.base_model.model.model.layers[0]
    head = trainer.model.base_model.model.lm_head

    def look(name: str) -> Any:
        return lambda *_: seen.update({name: [type(m.weight).__name__ for m in (head, layer.mlp.down_proj)]})

    model.model.get_base_model().model.norm.register_forward_hook(look("in the scorer, past the layers"))
    layer.mlp.register_forward_hook(look("in the layer"))
    trainer.step(rows(8))
    look("outside")()
    weights = list(trainer.model.parameters())
    local = sum(weight.to_local().numel() for weight in weights)
    seen["share"] = local / sum(weight.numel() for weight in weights)
    seen["moments"] = sorted({type(m["exp_avg"]).__name__ for m in trainer.engine.optimizer.state.values()})
    save_state(folder / f"{rank}.json", seen)


def test_a_weight_is_whole_only_where_it_runs(tmp_path: Path) -> None:
    """The head is whole beside a layer that is not any more: its own rows are never computed from pieces."""
    ranks(pieces_on_a_rank, tmp_path, folder=tmp_path)
    for rank in range(2):
        found = load_state(tmp_path / f"{rank}.json")
        assert found["in the layer"] == ["Parameter", "Parameter"]
        assert found["in the scorer, past the layers"] == ["Parameter", "DTensor"]
        assert found["outside"] == ["DTensor", "DTensor"]
        assert found["share"] == pytest.approx(0.5, abs=0.02)
        assert found["moments"] == ["DTensor"]


LONG_RUN: dict[str, Any] = {"max_tokens": 30, "load_best": True, "metric_for_best": "loss", "eval_steps": 1}


def run_on_a_rank(rank: int, folder: Path, adapter: str, stop: int | None, resume: bool) -> None:
    ask_for_fsdp()
    callbacks = [] if stop is None else [stop_after(stop)]
    done = run(folder / "run", resume=resume, callbacks=callbacks, adapter=adapter, **LONG_RUN)
    weights = whole_weights(done.trainer)
    done.trainer.save(folder / "export")
    save_tensors(folder / f"{rank}.safetensors", weights)
    save_state(folder / f"{rank}.json", {"history": without_clock(done.result.history)})


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_checkpoint_of_pieces_is_that_of_one_process_and_either_goes_on_from_it(
    tmp_path: Path, adapter: str
) -> None:
    alone = run(tmp_path / "alone", adapter=adapter, **LONG_RUN)
    ranks(run_on_a_rank, tmp_path, adapter, 3, False, folder=tmp_path)
    saved = newest_valid(tmp_path / "run").path
    assert saved is not None
    shutil.copytree(tmp_path / "run", tmp_path / "by one")
    files = {path.name for path in saved.iterdir()}
    assert files == {path.name for path in newest_valid(tmp_path / "alone").path.iterdir()}
    sizes = {name: value.shape for name, value in load_tensors(saved / "optimizer.safetensors").items()}
    whole = load_tensors(newest_valid(tmp_path / "alone").path / "optimizer.safetensors")
    assert sizes == {name: value.shape for name, value in whole.items()}

    ranks(run_on_a_rank, tmp_path, adapter, None, True, folder=tmp_path)
    by_one = run(tmp_path / "by one", resume=True, adapter=adapter, **LONG_RUN)
    export = next((tmp_path / "export").glob("*model.safetensors"))
    exported = {name: value.float().norm() for name, value in load_tensors(export).items()}
    assert exported
    assert all(value.isfinite() for value in exported.values())
    for found in (load_tensors(tmp_path / "0.safetensors"), by_one.trainer.engine.masters.copies()):
        for name, value in alone.trainer.engine.masters.copies().items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4 * float(value.abs().max()))
    history = load_state(tmp_path / "0.json")["history"]
    for row, expected in zip(history, without_clock(alone.result.history), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


def refused_on_a_rank(rank: int, folder: Path) -> None:
    ask_for_fsdp()
    told = {}
    for name, make in {
        "snapshot": lambda: preference_trainer(kind=DPOTrainer, data=pairs(4), reference="snapshot"),
        "copy": lambda: preference_trainer(kind=DPOTrainer, data=pairs(4), reference="copy"),
        "pissa": lambda: sft(adapter=lora(4, init="pissa")),
        "generate": lambda: sft().generate(["a"]),
        "ppo": ppo_trainer,
    }.items():
        with pytest.raises(CapabilityError) as caught:
            make()
        told[name] = str(caught.value)
    save_state(folder / f"{rank}.json", told)


def test_what_needs_the_whole_model_is_refused_by_name(tmp_path: Path) -> None:
    ranks(refused_on_a_rank, tmp_path, folder=tmp_path)
    told = load_state(tmp_path / "1.json")
    assert "Snapshot: expected a policy that lies whole" in told["snapshot"]
    assert "FrozenCopy: expected a policy that lies whole" in told["copy"]
    assert "an adapter that changed its base" in told["pissa"]
    assert "trainer.save(folder)" in told["generate"]
    assert "PPOTrainer" in told["ppo"]
