"""What the machine is, what it can do, and whether anything else is using it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import psutil

from benchmarks.records import Machine

__all__ = ["BUSY_PROCESS", "busiest_other", "describe", "reasons_to_wait", "versions"]

BUSY_PROCESS = 0.2  # cores
BUSY_LOAD = 0.5  # processes per core, averaged over the last minute
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "tokenizers")


def busiest_other(seconds: float) -> tuple[float, str]:
    """Cores used by the busiest process that is not ours, and its name, over a sample of some seconds."""
    ours = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    watched = [process for process in psutil.process_iter(["name"]) if process.pid not in ours]
    before = {process: _cpu_seconds(process) for process in watched}
    time.sleep(seconds)
    used = [
        ((_cpu_seconds(process) - start) / seconds, f"{process.info['name']} ({process.pid})")
        for process, start in before.items()
    ]
    return max(used, default=(0.0, "none"))


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:  # it ended, or is not ours to ask
        return 0.0
    return float(times.user + times.system)


def reasons_to_wait(seconds: float = 2.0) -> list[str]:
    """Why timings taken now would mean nothing: one line per reason, none on a quiet machine."""
    reasons = []
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY_LOAD * cores:
        reasons.append(f"the load average of the last minute is {load:.2f} on {cores} cores")
    used, name = busiest_other(seconds)
    if used > BUSY_PROCESS:
        reasons.append(f"{name} uses {used:.0%} of a core")
    return reasons


def describe(*, size: int, copy_bytes: int) -> Machine:
    """The machine, its libraries and its measured speeds.

    Args:
        size: side of the square matrices multiplied.
        copy_bytes: size of the tensor copied.
    """
    import torch

    def matmul(dtype: torch.dtype) -> float:
        left, right = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
        return 2 * size**3 / _seconds(lambda: torch.mm(left, right))

    source = torch.ones(copy_bytes // 4)
    target = torch.empty_like(source)
    return Machine(
        cpu=_cpu_info("model name"),
        flags=sorted(_cpu_info("flags").split()),
        cores=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        system=platform.platform(),
        allocator=" ".join(platform.libc_ver()) or "unknown",
        load_average=list(os.getloadavg()),
        versions=versions(),
        matmul_flops={"bfloat16": matmul(torch.bfloat16), "float32": matmul(torch.float32)},
        copy_bytes=2 * copy_bytes / _seconds(lambda: target.copy_(source)),
    )


def versions() -> dict[str, str]:
    """Of this interpreter and the libraries in its environment."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _seconds(work: Callable[[], object], *, repeats: int = 15, budget: float = 5.0) -> float:
    """Median time of some work after one warm-up; fewer repeats where they take longer than `budget`."""
    work()
    times: list[float] = []
    while len(times) < repeats and (sum(times) < budget or not times):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times)


def _cpu_info(key: str) -> str:
    """A line of /proc/cpuinfo; empty where the system has none."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
