"""Environments for baselines that need other versions than the project: one file of pins for each.

An environment lies in the user's cache, named after its pins, and is made on first use.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

__all__ = ["existing", "make"]

PINS = Path(__file__).resolve().parent
READY = "ready"  # a file that is written last


def existing(name: str) -> Path | None:
    """The interpreter of an environment that was made before, else None."""
    folder = _folder(name)
    return _python(folder) if (folder / READY).is_file() else None


def make(name: str) -> Path:
    """The interpreter of an environment, made with pip where there is none yet.

    Raises:
        CalledProcessError: venv or pip failed; they have said why.
    """
    found = existing(name)
    if found is not None:
        return found
    folder = _folder(name)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(_python(folder)), "-m", "pip", "install", "--quiet", "--requirement", str(_pins(name))]
    subprocess.run(pip, check=True)
    (folder / READY).touch()
    return _python(folder)


def _pins(name: str) -> Path:
    return PINS / f"{name}.txt"


def _folder(name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    pins = hashlib.sha256(_pins(name).read_bytes()).hexdigest()[:12]
    return cache / "ftlib-benchmarks" / f"{name}-{pins}"


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
