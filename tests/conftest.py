"""The whole suite runs offline, seeded, and without a display. Set up before torch is imported."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.offline import block_network

# Child processes inherit these; libraries read them when they are first imported.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "Agg",
    }
)
# Encoded data are cached by fingerprint: a fresh folder keeps one run from reading another's rows.
_CACHE = tempfile.TemporaryDirectory(prefix="ftlib-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name
block_network()

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SEED = 0


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The global generators start every test from the same state, whatever ran before."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  libraries under test draw from the global generator
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def global_torch_settings_stay() -> Iterator[None]:
    """A test, or the code in it, that changes torch's defaults would change the tests after it."""
    before = _torch_settings()
    yield
    after = _torch_settings()
    assert after == before


def _torch_settings() -> dict[str, object]:
    return {
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
    }


@pytest.fixture
def root() -> Path:
    """The repository's root, where README.md and faq.jsonl lie."""
    return ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a CUDA device are skipped by name where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_unconfigure() -> None:
    """The cache goes when the session ends."""
    _CACHE.cleanup()
