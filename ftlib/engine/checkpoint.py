"""Writing checkpoints that exist whole and verified, or not at all.

    1. compare free space with the bytes expected;
    2. create ``.staging-<run id>-<step>`` in the same folder;
    3. write, flush and hash each file;
    4. write and flush the manifest, then flush the staging folder;
    5. rename to ``checkpoint-<step>``, flush the parent;
    6. read the manifest and sizes again; only then remove older checkpoints.

A process killed at any point leaves either a hidden leftover, which the next holder of the run's lock
removes, or a checkpoint that verifies. Reading is in `ftlib.engine.manifest`.

Left out on purpose: sharded writing by several ranks; one process writes what the ranks gathered.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError

from ftlib.engine.files import fsync_folder
from ftlib.engine.manifest import PREFIX, read_manifest, seal_files, verify, write_manifest
from ftlib.errors import CheckpointError

__all__ = ["HEADROOM", "CheckpointStore", "remove_leftovers"]

logger = logging.getLogger(__name__)

HEADROOM = 1.1  # free bytes asked for, per byte expected
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_LEFTOVER = re.compile(r"\.staging-.+-\d{8,}|\.trash-checkpoint-\d{8,}(-\d+)*")
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def _no_stage(number: int) -> None:
    """Nobody watches the stages."""


@final
class CheckpointStore:
    """The checkpoints of one run in one folder. Hold the folder's `RunLock` while using it.

    Args:
        folder: the run's output folder; created when it is missing.
        run_id: letters, digits, ``-`` and ``_``; a resumed run keeps the id of its manifest. Folders of
            other ids are never removed.
        keep: how many of the newest checkpoints stay, >= 1; the best and `resumed_from` stay besides.
        resumed_from: the checkpoint this process started from, if any.
        stage: called with 1 to 6 as each numbered step above begins.

    Raises:
        CheckpointError: the folder cannot be created, a bad run id, or `keep` below 1.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        run_id: str,
        keep: int = 2,
        resumed_from: Path | None = None,
        stage: Callable[[int], None] = _no_stage,
    ) -> None:
        if not _RUN_ID.fullmatch(run_id):
            raise CheckpointError(f"run_id: expected up to 64 letters, digits, '-' and '_', got {run_id!r}.")
        if keep < 1:
            raise CheckpointError(f"keep: expected at least 1 checkpoint to keep, got {keep}.")
        self.folder = Path(folder)
        self.run_id = run_id
        self.keep = keep
        self.resumed_from = resumed_from
        self._stage = stage
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{folder}: expected a folder to write to, got {error}.") from error

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        *,
        manifest: Mapping[str, Any],
        expected_bytes: int,
        best: bool = False,
    ) -> Path:
        """Write one checkpoint, verify it, and only then remove those it replaces.

        Args:
            step: optimiser steps completed, >= 0.
            write: puts the files, flat, into the folder it is handed.
            manifest: what else the manifest says: versions, config, fingerprints.
            expected_bytes: about how much `write` will write.
            best: whether this is the best model so far; the best one survives rotation.

        Returns:
            The finished folder, ``checkpoint-<step>``, with a counter when that name was taken.

        Raises:
            CheckpointError: it could not be written. Nothing of it is left and older ones are untouched,
                so the same call may be tried again. Errors of `write` other than OSError pass through.
        """
        staging = self.folder / f".staging-{self.run_id}-{step:08d}"
        published: Path | None = None
        try:
            self._stage(1)
            self._check_space(expected_bytes)
            self._stage(2)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            flushable = fsync_folder(staging)
            self._stage(3)
            write(staging)
            own = {"run_id": self.run_id, "step": step, "best": best, "written": time.time()}
            files = seal_files(staging)
            self._stage(4)
            write_manifest(staging, own | {"folder_fsync": flushable, "files": files}, manifest)
            fsync_folder(staging)
            self._stage(5)
            published = self._publish(staging, step)
            self._stage(6)
            verify(published, hashes=False)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            if published is not None:
                _discard(published)
            if isinstance(error, (OSError, SafetensorError)):
                raise self._explain(step, error, expected_bytes) from error
            raise
        self._rotate(published)
        return published

    def _check_space(self, expected_bytes: int) -> None:
        needed, free = int(expected_bytes * HEADROOM), shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(
                f"{self.folder}: expected {needed:,} bytes free for a checkpoint, got {free:,} bytes. "
                "Free some space or lower keep_checkpoints; earlier checkpoints are untouched."
            )

    def _publish(self, staging: Path, step: int) -> Path:
        """Give the staging folder its final name, one nobody has, and flush the rename."""
        taken = (f"{PREFIX}{step:08d}-{count}" for count in itertools.count(1))
        names = itertools.chain([f"{PREFIX}{step:08d}"], taken)
        place = next(path for path in (self.folder / name for name in names) if not os.path.lexists(path))
        staging.rename(place)
        try:
            fsync_folder(self.folder)
        except OSError:  # it may not survive a power cut, so it must not be taken for a good one
            _discard(place)
            raise
        return place

    def _explain(self, step: int, error: Exception, expected_bytes: int) -> CheckpointError:
        try:
            free = f"{shutil.disk_usage(self.folder).free:,} bytes"
        except OSError:
            free = "unknown, the folder cannot be reached"
        full = _errno(error) in _DISK_FULL
        fix = (
            "Free some space or raise the file-size limit"
            if full
            else "Check that the folder exists and is writable"
        )
        return CheckpointError(
            f"{self.folder}: expected to write the checkpoint of step {step}, got {error}. "
            f"Needed: about {expected_bytes:,} bytes; free: {free}. {fix}; earlier checkpoints are untouched."
        )

    def _rotate(self, saved: Path) -> None:
        """Remove this run's checkpoints beyond the newest, the best, and the one resumed from."""
        own: list[tuple[int, float, Path, bool]] = []
        for path in self.folder.glob(f"{PREFIX}*"):
            try:
                manifest = read_manifest(path)
            except CheckpointError:  # not known to be ours
                continue
            if manifest["run_id"] == self.run_id and not path.is_symlink():
                when = manifest.get("written", 0.0)
                own.append((manifest["step"], when, path, manifest.get("best") is True))
        own.sort(reverse=True)
        kept = {saved, *(path for _, _, path, _ in own[: self.keep])}
        kept.update([path for _, _, path, best in own if best][:1])
        stays = None if self.resumed_from is None else self.resumed_from.resolve()
        for _, _, path, _ in own:
            if path not in kept and path.resolve() != stays:
                _discard(path)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed runs left half written or half deleted. Only for the holder of the run's lock."""
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            _remove(path)


def _errno(error: Exception) -> int | None:
    """The system's error number; the writer of safetensors tells it only in its text."""
    if isinstance(error, OSError):
        return error.errno
    told = re.search(r"os error (\d+)", str(error))
    return int(told[1]) if told else None


def _discard(path: Path) -> None:
    """Take a checkpoint off its name at once, then delete it: half of one is never seen under it."""
    for count in itertools.count():
        trash = path.with_name(f".trash-{path.name}" + (f"-{count}" if count else ""))
        if not os.path.lexists(trash):
            break
    try:
        path.rename(trash)
    except OSError as error:
        logger.warning("could not remove the checkpoint %s: %s", path, error)
        return
    _remove(trash)


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("could not remove %s: %s", path, error)
