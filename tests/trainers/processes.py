"""Processes of their own, started in milliseconds: forked from one server that has imported everything.

The server never computes, so its children may use torch as they like. One alone imports for seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

__all__ = ["ranks", "start"]

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.trainers.runs"])


def start(function: Callable[..., None], *args: Any, errors: Path) -> ForkServerProcess:
    """Start `function(*args)`, a function of a module; its traceback goes to the file `errors`."""
    process = _SERVER.Process(target=_run, args=(function, args, errors), daemon=True)
    process.start()
    return process


def _run(function: Callable[..., None], args: tuple[Any, ...], errors: Path) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        function(*args)
    except BaseException:  # noqa: BLE001  the process ends here, whatever happened
        errors.write_text(traceback.format_exc())
        raise SystemExit(1) from None


def ranks(
    function: Callable[..., None], *args: Any, folder: Path, world: int = 2, timeout: float = 120
) -> None:
    """Run `function(rank, *args)` on so many gloo ranks, as torchrun would start them, and wait.

    Fails when a rank fails, or when they are not done after `timeout` seconds, with their tracebacks.
    """
    port = _free_port()
    errors = [folder / f"errors-{rank}" for rank in range(world)]
    processes = [
        start(_as_rank, rank, world, port, function, args, errors=errors[rank]) for rank in range(world)
    ]
    ends = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, ends - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    told = "\n".join(path.read_text() for path in errors if path.exists())
    assert codes == [0] * world, f"exit codes {codes}; None is a rank that hung\n{told}"


def _as_rank(rank: int, world: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_USE_CPU": "true",
    }
    function(rank, *args)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
