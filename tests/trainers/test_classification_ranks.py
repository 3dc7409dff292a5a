"""Two gloo processes train a classifier as one does, whatever share of the rows each has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ftlib.engine.files import load_state, load_tensors, save_state, save_tensors
from tests.trainers.processes import ranks
from tests.trainers.test_classification import PAIRS, SETS, made
from tests.trainers.tiny import trained

RELATIVE = 1e-5  # float32: sums taken in another order


def encoded(ids: list[int], label: int) -> dict[str, Any]:
    return {
        "prefix_ids": [],
        "prefix_weights": [],
        "continuation_ids": [ids],
        "continuation_weights": [[0.0] * (len(ids) - 1) + [1.0]],
        "length": len(ids),
        "source": "rows",
        "label": [float(label)],
        "weight": [1.0],
    }


# Three micro-batches for two ranks: one takes part with the shortest row, which must not count twice.
UNEVEN = [encoded([17, 20, 9], 0), encoded([12], 1), encoded([8, 11], 2)]
SHARES: dict[str, dict[str, Any]] = {
    "encoder, pairs, all weights": {
        "way": "full",
        "rows": PAIRS,
        "classes": 2,
        "class_weights": "balanced",
        "max_tokens": 60,
    },
    "encoder, several classes": {"rows": SETS, "classes": 4},
    "decoder, uneven": {
        "kind": "decoder",
        "rows": UNEVEN,
        "labels": ["cat", "dog", "sky"],
        "max_tokens": 2,
    },
}


def three_steps(share: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Rows, an evaluation, predictions, and weights; plain gradient descent, linear in the gradient."""
    options = SHARES[share]
    trainer = made(optimizer=lambda groups, rate: torch.optim.SGD(groups, 0.05), **options)
    rows = options["rows"]
    steps = [trainer.step(rows) for _ in range(3)]
    scores = [row["scores"] for row in trainer.predict(rows)]
    loss = trainer.evaluate(rows)["eval_loss"]
    return {"steps": steps, "loss": loss, "scores": scores}, trained(trainer)  # type: ignore[arg-type]


def three_steps_on_a_rank(rank: int, share: str, folder: Path) -> None:
    told, weights = three_steps(share)
    save_state(folder / f"{rank}.json", told)
    save_tensors(folder / f"{rank}.safetensors", weights)


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES)
def test_two_ranks_are_one_process(share: str, tmp_path: Path) -> None:
    ranks(three_steps_on_a_rank, share, tmp_path, folder=tmp_path)
    told, weights = three_steps(share)
    assert told["steps"][-1]["loss"] != told["steps"][0]["loss"]
    for rank in range(2):
        found = load_state(tmp_path / f"{rank}.json")
        for row, expected in zip(found["steps"], told["steps"], strict=True):
            assert row == pytest.approx(expected, rel=RELATIVE, abs=RELATIVE)
        assert found["loss"] == pytest.approx(told["loss"], rel=RELATIVE)
        for row, expected in zip(found["scores"], told["scores"], strict=True):
            assert row == pytest.approx(expected, rel=RELATIVE, abs=RELATIVE)
    first, second = (load_tensors(tmp_path / f"{rank}.safetensors") for rank in range(2))
    for name, value in weights.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=0, atol=RELATIVE * float(value.abs().max()))
