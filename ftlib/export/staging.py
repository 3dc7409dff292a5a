"""A folder that appears whole or not at all, beside files of others that stay.

Everything is written into a hidden folder next to the target and flushed. A target that does not exist
yet gets the name in one rename; into one that exists, the files are moved one by one, each in one step.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError

from ftlib.errors import CheckpointError

__all__ = ["staged"]

# Of one model: a file left over from an earlier, differently sharded one would be read in its place.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """An empty folder to write into; its files take their places in `target` when the scope ends well.

    Raises:
        CheckpointError: the disk refuses; what stood in `target` still stands.
    """
    try:
        staging = target.parent / f".{target.name}-{uuid4().hex}"
        staging.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"save: expected to write beside {target}, got: {error}.") from error
    try:
        yield staging
        _publish(staging, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"save: expected to write {target}, got: {error}. Nothing was left there."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # gone already, unless something failed


def _publish(staging: Path, target: Path) -> None:
    files = sorted(staging.iterdir())
    for path in staging.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if not target.exists():
        staging.rename(target)
        return
    names = {path.name for path in files}
    replaces_weights = any(path.match(pattern) for path in files for pattern in _WEIGHTS)
    for path in files:
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        path.replace(target / path.name)
    if replaces_weights:
        for stale in [
            path for pattern in _WEIGHTS for path in target.glob(pattern) if path.name not in names
        ]:
            stale.unlink()
