"""Randomness and process state as scopes: taken over on entry, given back on exit, also after an error.

The generators are Python's `random`, NumPy's global one, torch's on the CPU, and torch's on every CUDA
device once CUDA is in use. Reading them never starts CUDA.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import random
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ftlib.errors import CheckpointError

__all__ = [
    "StopFlag",
    "capture_rng",
    "forked_rng",
    "modes",
    "restore_rng",
    "rng_scope",
    "row_seed",
    "stop_signals",
]

logger = logging.getLogger(__name__)


def capture_rng() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of every global generator, as tensors for safetensors and values for JSON.

    Returns:
        ``torch_cpu`` and ``cuda_0``, ``cuda_1``, …: uint8 vectors; ``numpy_keys``: int64 [624]; and a
        JSON object with the scalar parts of NumPy's state and with Python's.

    Raises:
        CheckpointError: NumPy's global generator was replaced by one that is not a Mersenne twister.
    """
    numpy = dict(np.random.get_state(legacy=False))  # noqa: NPY002  the global one is meant
    kind, words_624 = numpy["bit_generator"], numpy["state"]
    if kind != "MT19937":
        raise CheckpointError(
            f"numpy.random: expected the MT19937 generator, got {kind}. Restore the default one."
        )
    keys = torch.from_numpy(words_624["key"].astype(np.int64))
    tensors = {"torch_cpu": torch.get_rng_state(), "numpy_keys": keys}
    if torch.cuda.is_initialized():
        tensors |= {f"cuda_{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, next_gauss = random.getstate()
    scalars = {
        "numpy": {
            "position": int(words_624["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
        "python": {"version": version, "words": list(words), "next_gauss": next_gauss},
    }
    return tensors, scalars


def restore_rng(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    """Put every global generator into a captured state. CUDA states wait until CUDA starts.

    Args:
        tensors: as `capture_rng` returned them, on the CPU.
        scalars: the JSON object, also after a round trip through JSON.

    Raises:
        CheckpointError: a part is missing.
    """
    try:
        numpy, python = scalars["numpy"], scalars["python"]
        keys, torch_cpu = tensors["numpy_keys"].numpy().astype(np.uint32), tensors["torch_cpu"]
    except KeyError as error:
        raise CheckpointError(
            f"rng: expected the state {error}, got none. Use another checkpoint."
        ) from error
    state = ("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["gauss"])
    np.random.set_state(state)  # noqa: NPY002
    random.setstate((python["version"], tuple(python["words"]), python["next_gauss"]))
    torch.set_rng_state(torch_cpu)
    _restore_cuda({key: value for key, value in tensors.items() if key.startswith("cuda_")})


def _restore_cuda(states: Mapping[str, Tensor]) -> None:
    if not states:
        return
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(states) != devices:
        logger.warning(
            "the state holds generators of %d CUDA devices and this machine has %d: "
            "numbers drawn on them will differ from an uninterrupted run",
            len(states),
            devices,
        )
    for index in range(min(devices, len(states))):
        torch.cuda.set_rng_state(states[f"cuda_{index}"], index)


@contextmanager
def forked_rng() -> Iterator[None]:
    """Draw freely inside: the generators come out as they went in. For evaluation, logging, callbacks.

    Example:
        >>> before = random.getstate()
        >>> with forked_rng():
        ...     _ = random.random()
        >>> random.getstate() == before
        True
    """
    tensors, scalars = capture_rng()
    try:
        yield
    finally:
        restore_rng(tensors, scalars)


@contextmanager
def rng_scope(seed: int) -> Iterator[None]:
    """Seed the global generators inside, and give the caller's states back on exit.

    Args:
        seed: 0 to 2**32 - 1, the range of NumPy's.
    """
    with forked_rng():
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():  # else it starts from torch's fixed default
            torch.cuda.manual_seed_all(seed)
        yield


def row_seed(seed: int, epoch: int, example_id: int | str) -> int:
    """Seed of one row's own randomness: the same wherever in the data stream the row is met.

    Args:
        seed: the run's seed.
        epoch: counted from 0.
        example_id: index or name of the row; ``7`` and ``"7"`` are different rows.

    Returns:
        0 to 2**63 - 1, for `torch.Generator.manual_seed` and its like.
    """
    row = f"s{example_id}" if isinstance(example_id, str) else f"i{operator.index(example_id)}"
    text = f"{operator.index(seed)}:{operator.index(epoch)}:{row}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass
class StopFlag:
    """Who asked the loop to stop: ``"SIGTERM"``, ``"SIGINT"``, a caller's own word, or None for nobody."""

    stopped_by: str | None = None


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Turn the first SIGTERM or SIGINT into a flag to poll; the second raises at once.

    Handlers go in only in the main thread, and the ones found there come back on exit. A signal that
    was being ignored stays ignored. In other threads only the flag exists, for the caller to set.

    Raises:
        KeyboardInterrupt: inside, on the second signal when that is SIGINT.
        SystemExit: inside, likewise for SIGTERM, with the status 143 that shells give it.
    """
    flag = StopFlag()

    def on_signal(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  signal's signature
        if flag.stopped_by is None:
            flag.stopped_by = signal.Signals(number).name
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)

    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (int(signal.SIGTERM), int(signal.SIGINT)):
                found = signal.getsignal(number)
                if found not in (None, signal.SIG_IGN):  # None: set by other than Python, cannot be put back
                    before[number] = found
                    signal.signal(number, on_signal)
        yield flag
    finally:
        for watched, handler in before.items():
            signal.signal(watched, handler)


@contextmanager
def modes(model: nn.Module) -> Iterator[None]:
    """Switch train, eval and `requires_grad` freely inside: each module and parameter gets its own back.

    Args:
        model: what is in it on entry is restored; what is added inside is left alone.
    """
    training = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode  # not .train(), which would reach into its children
        for parameter, mode in trainable.items():
            parameter.requires_grad_(mode)
