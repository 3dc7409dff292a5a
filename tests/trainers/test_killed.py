"""kill -9 at random moments: what is on the disk always resumes, and ends where an unharmed run ends."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from ftlib.engine.files import load_state, load_tensors, save_state, save_tensors
from ftlib.engine.manifest import newest_valid
from tests.trainers.processes import start
from tests.trainers.runs import Run, run
from tests.trainers.tiny import without_clock

OPTIONS = {"adapter": "lora dropout", "epochs": 8, "max_tokens": 30}  # 24 steps, a checkpoint every two
KILLS, LONGEST = 4, 1.5  # times killed per seed; seconds until then, about those of a whole run


@pytest.fixture(scope="module")
def unharmed() -> Run:
    return run(None, **OPTIONS)


def resumed_run(output: Path, record: Path) -> None:
    """Train to the end, from wherever the last process was killed, and record what came out."""
    done = run(output, resume=True, save_steps=2, **OPTIONS)
    save_tensors(record / "weights.safetensors", done.weights)
    save_state(record / "history.json", {"history": without_clock(done.result.history)})


@pytest.mark.parametrize("seed", range(5))
def test_killed_at_random_moments_and_resumed_is_the_same_run(tmp_path, seed, unharmed):
    moments = random.Random(seed)
    output, errors = tmp_path / "run", tmp_path / "errors"
    for _ in range(KILLS):
        process = start(resumed_run, output, tmp_path, errors=errors)
        time.sleep(moments.uniform(0, LONGEST))
        process.kill()
        process.join()
        assert not errors.exists(), errors.read_text()
        assert newest_valid(output).skipped == [], "a folder under a final name is whole"
    last = start(resumed_run, output, tmp_path, errors=errors)
    last.join(timeout=120)
    assert last.exitcode == 0, errors.read_text()
    weights = load_tensors(tmp_path / "weights.safetensors")
    assert weights.keys() == unharmed.weights.keys()
    assert all(torch.equal(weights[name], value) for name, value in unharmed.weights.items())
    assert load_state(tmp_path / "history.json")["history"] == without_clock(unharmed.result.history)
    left = [path.name for path in output.iterdir() if not path.name.startswith("checkpoint-")]
    assert left == [], "what killed processes left is gone"
