"""Two gloo processes are one process: same losses, gradients and weights, whatever share each has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ftlib.engine.files import load_state, load_tensors, save_state, save_tensors
from ftlib.engine.manifest import newest_valid
from ftlib.errors import NonFiniteError
from tests.trainers.processes import ranks
from tests.trainers.runs import DATA, EVAL, STEPS, Run, run, stop_after
from tests.trainers.tiny import At, rows, sft, trained, without_clock

RELATIVE = 1e-5  # float32: sums taken in another order
ONE_LONG = [
    *rows(8)[:4],
    {**rows(1)[0], "continuation_ids": [[7] * 60], "continuation_weights": [[1.0] * 60], "length": 62},
]
SHARES: dict[str, dict[str, Any]] = {
    "4 and 4": {"data": rows(8)},
    "several micro-batches each": {"data": rows(8), "max_tokens": 22},
    "one micro-batch and three": {"data": ONE_LONG, "max_tokens": 20},
    "fewer examples than ranks": {"data": rows(1)},
    "all weights": {"data": rows(8), "max_tokens": 30, "adapter": "full"},
    "bfloat16 with masters": {"data": rows(8), "max_tokens": 30, "adapter": "full", "dtype": torch.bfloat16},
}


def three_steps(share: str) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Logged rows and weights; gradient descent with momentum, whose steps are linear in the gradient."""
    options = SHARES[share]
    trainer = sft(optimizer=lambda groups, rate: torch.optim.SGD(groups, 0.05, 0.9), **options)
    return [trainer.step(options["data"]) for _ in range(3)], trained(trainer)


def three_steps_on_a_rank(rank: int, share: str, folder: Path) -> None:
    logged, weights = three_steps(share)
    save_state(folder / f"{rank}.json", {"rows": logged})
    save_tensors(folder / f"{rank}.safetensors", weights)


@pytest.mark.parametrize("share", SHARES)
def test_two_ranks_are_one_process(tmp_path, share):
    ranks(three_steps_on_a_rank, share, tmp_path, folder=tmp_path)
    logged, weights = three_steps(share)
    relative = 2e-2 if share.startswith("bfloat16") else RELATIVE  # gradients meet in bfloat16
    for rank in range(2):
        found = load_state(tmp_path / f"{rank}.json")["rows"]
        for row, expected in zip(found, logged, strict=True):
            assert row == pytest.approx(expected, rel=relative)
    first, second = (load_tensors(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, value in weights.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=relative * float(value.abs().max()))


def evaluation_on_a_rank(rank: int, folder: Path) -> None:
    trainer = sft(eval_data=EVAL, eval_batch_size=2)
    save_state(folder / f"{rank}.json", {"eval": trainer.evaluate(), "predict": trainer.predict(EVAL)})


def test_an_evaluation_on_two_ranks_is_that_of_one_process(tmp_path):
    ranks(evaluation_on_a_rank, tmp_path, folder=tmp_path)
    trainer = sft(eval_data=EVAL)
    for rank in range(2):
        found = load_state(tmp_path / f"{rank}.json")
        assert found["eval"] == pytest.approx(trainer.evaluate(), rel=RELATIVE)
        for row, expected in zip(found["predict"], trainer.predict(EVAL), strict=True):
            assert row == pytest.approx(expected, rel=RELATIVE)


LONG_RUN = {
    "adapter": "lora dropout",
    "max_tokens": 30,
    "load_best": True,
    "metric_for_best": "loss",
    "eval_steps": 1,
}


def record(rank: int, folder: Path, done: Run) -> None:
    save_tensors(folder / f"{rank}.safetensors", done.weights)
    save_state(folder / f"{rank}.json", {"history": without_clock(done.result.history)})


def whole_run_on_a_rank(rank: int, folder: Path) -> None:
    record(rank, folder, run(folder / "run", **LONG_RUN))


def stopped_run_on_a_rank(rank: int, folder: Path) -> None:
    run(folder / "run", callbacks=[stop_after(3)], **LONG_RUN)


def resumed_run_on_a_rank(rank: int, folder: Path) -> None:
    record(rank, folder, run(folder / "run", resume=True, **LONG_RUN))


def test_two_ranks_stopped_and_resumed_are_two_ranks_uninterrupted_bit_for_bit(tmp_path):
    """With dropout: each rank draws its own numbers, and gets them back. The best weights reach both."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    ranks(whole_run_on_a_rank, whole, folder=whole)
    ranks(stopped_run_on_a_rank, parts, folder=parts)
    assert newest_valid(parts / "run").manifest["step"] == 3
    ranks(resumed_run_on_a_rank, parts, folder=parts)
    for rank in range(2):
        expected, found = (load_tensors(folder / f"{rank}.safetensors") for folder in (whole, parts))
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        expected, found = (load_state(folder / f"{rank}.json") for folder in (whole, parts))
        assert found == expected
    first, second = (load_tensors(whole / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_a_checkpoint_of_two_ranks_goes_on_in_one_process_with_a_warning(tmp_path, caplog):
    ranks(stopped_run_on_a_rank, tmp_path, folder=tmp_path)
    result = run(tmp_path / "run", resume=True, **LONG_RUN).result
    assert result.metrics["steps"] == STEPS
    assert "bit-identical results are not promised" in caplog.text


def stop_from_second_rank(rank: int, folder: Path) -> None:
    def stop(control: object) -> None:
        if rank == 1:
            trainer.stop()

    trainer = sft(data=DATA, output_dir=folder / "run", callbacks=[At("on_step_end", 2, stop)])
    result = trainer.train()
    save_state(folder / f"{rank}.json", {"by": result.stopped_by, "steps": result.metrics["steps"]})


def test_a_stop_asked_for_on_one_rank_stops_both_at_the_same_step(tmp_path):
    ranks(stop_from_second_rank, tmp_path, folder=tmp_path)
    found = [load_state(tmp_path / f"{rank}.json") for rank in range(2)]
    assert found == [{"by": "another rank", "steps": 2}, {"by": "stop()", "steps": 2}]
    assert newest_valid(tmp_path / "run").manifest["step"] == 2


def nan_on_second_rank(rank: int, folder: Path) -> None:
    trainer = sft(data=rows(8))
    if rank == 1:
        trainer.engine.scorer.register_forward_hook(
            lambda module, args, scored: replace(scored, logprobs_N=scored.logprobs_N * float("nan"))
        )
    before, told = trained(trainer), ""
    try:
        trainer.step(rows(8))
    except NonFiniteError as error:
        told = str(error)
    moved = [name for name, value in trained(trainer).items() if not torch.equal(value, before[name])]
    save_state(folder / f"{rank}.json", {"told": told, "moved": moved, "weights": len(before)})


def test_a_non_finite_loss_on_one_rank_is_refused_on_both(tmp_path):
    ranks(nan_on_second_rank, tmp_path, folder=tmp_path)
    for rank in range(2):
        found = load_state(tmp_path / f"{rank}.json")
        assert "expected a finite loss and gradient, got loss nan" in found["told"]
        assert found["weights"] > 0
        assert found["moved"] == []
