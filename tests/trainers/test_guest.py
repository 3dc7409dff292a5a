"""ftlib in someone else's process: nothing global changes, and nothing of the caller's."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, dict[str, list[str]]]:
    """What a fresh process found changed, moment by moment."""
    command = [sys.executable, "-m", "tests.trainers.guest", str(tmp_path_factory.mktemp("guest") / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    # peft, imported first on purpose, imports bitsandbytes, which recommends packages
    printed = [line for line in done.stderr.splitlines() if "kernels-community" not in line]
    assert printed == [], "nothing is printed that was not asked for"
    return json.loads(done.stdout)


@pytest.mark.parametrize("moment", ["import", "construction", "training", "an error in training"])
def test_nothing_of_the_process_or_the_caller_changes(told, moment):
    assert told[moment] == {}


def test_importing_ftlib_imports_neither_torch_nor_transformers():
    heavy = [
        "torch",
        "transformers",
        "peft",
        "datasets",
        "accelerate",
        "trl",
        "numpy",
        "pandas",
        "matplotlib",
    ]
    code = f"import sys, ftlib; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
