"""One live process per output folder: a lock file that names its owner.

The owner is its process id, host, boot id and, where the system tells, the moment the process started,
so that an id used again by another process does not count. A lock of another host cannot be checked
and is believed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, final

from ftlib.engine.checkpoint import remove_leftovers
from ftlib.errors import CheckpointError

__all__ = ["LOCK", "RunLock"]

LOCK = "run.lock"


@final
class RunLock:
    """Context manager that owns a run's output folder, and clears what killed owners left half done.

    Args:
        folder: the output folder; created when it is missing.

    Raises:
        CheckpointError: on entering, when a live process holds the folder (the message names it), or
            when the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, RunLock(folder):
        ...     (Path(folder) / LOCK).exists()
        True
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._owner: dict[str, Any] | None = None

    def __enter__(self) -> RunLock:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(self.folder):
                self._acquire()
        except OSError as error:
            raise CheckpointError(f"{self.folder}: expected a folder to write to, got {error}.") from error
        remove_leftovers(self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        path, mine = self.folder / LOCK, self._owner
        self._owner = None
        if mine is None or mine["pid"] != os.getpid():  # a forked child owns nothing
            return
        with contextlib.suppress(OSError):  # a folder that went away took its lock along
            if _read(path) == mine:
                path.unlink()

    def _acquire(self) -> None:
        path = self.folder / LOCK
        owner = _read(path)
        if owner is not None and _alive(owner):
            raise CheckpointError(
                f"{path}: expected a free folder, got one held by process {owner.get('pid')} on host "
                f"{owner.get('host')}. Stop it, use another output_dir, or delete the file if it is gone."
            )
        mine = _this_process()
        fresh = path.with_name(f".{LOCK}.new")
        fresh.write_text(json.dumps(mine) + "\n", encoding="utf-8")
        fresh.replace(path)  # whole or not at all: a reader never sees half an owner
        self._owner = mine


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process look at the lock and take it before the next looks, where the system can."""
    try:
        import fcntl
    except ImportError:  # Windows: two processes starting in the same instant are not told apart
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "boot_id": _boot_id(), "started": _started(pid)}


def _read(path: Path) -> dict[str, Any] | None:
    """The owner written in a lock; None for no lock, or one that a crash left unreadable."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return owner if isinstance(owner, dict) and type(owner.get("pid")) is int else None


def _alive(owner: dict[str, Any]) -> bool:
    if owner.get("host") != socket.gethostname():
        return True  # cannot be seen from here
    if owner.get("boot_id") != _boot_id():
        return False
    pid: int = owner["pid"]
    started = _started(pid)
    if started is not None:
        return bool(started == owner.get("started"))
    if os.name == "nt":  # there, signal 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not Path("/proc/self/stat").exists()  # with /proc, no start time means a zombie or nobody


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Clock ticks from boot to the start of a live process; None for a dead one, or without /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat[stat.rindex(")") + 2 :].split()  # the name before it may hold anything
    return None if state in "ZX" else int(fields[18])
