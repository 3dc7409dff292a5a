"""Log-probabilities of groups in a folder: small safetensors files that are whole and right, or not read.

A file holds some groups computed under one key. Its name and its content carry the key, and a checksum of
all its bytes stands in its header, so a file that was cut, changed, renamed or written by something else is
passed over. Files appear by renaming; several processes may share the folder.

Shapes: K groups of a file, S scored tokens of all of them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["DIGEST_BYTES", "LogprobFiles", "pack", "unpack"]

logger = logging.getLogger(__name__)
DIGEST_BYTES = hashlib.sha256().digest_size
_OURS = re.compile(r"[0-9a-f]{64}-[0-9a-f]{16}\.safetensors")
_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.partial")
_ABANDONED = 3600  # seconds after which a file that was never renamed belongs to a process that died
_MANY = 64  # files of one key that are rewritten as one


def pack(groups: Mapping[bytes, Tensor]) -> dict[str, Tensor]:
    """Groups in order as three tensors: digests uint8 [K, 32], lengths int64 [K], values float32 [S]."""
    digests = torch.frombuffer(bytearray(b"".join(groups)), dtype=torch.uint8) if groups else torch.empty(0)
    values = [torch.empty(0), *groups.values()]
    return {
        "digests": digests.to(torch.uint8).view(-1, DIGEST_BYTES),
        "lengths": torch.tensor([len(value) for value in groups.values()], dtype=torch.int64),
        "values": torch.cat(values),
    }


def unpack(tensors: Mapping[str, Any]) -> dict[bytes, Tensor]:
    """The groups that `pack` packed, in order.

    Raises:
        ValueError: tensors that it cannot have made.
    """
    digests, lengths, values = (tensors.get(name) for name in ("digests", "lengths", "values"))
    if not (isinstance(digests, Tensor) and isinstance(lengths, Tensor) and isinstance(values, Tensor)):
        raise ValueError(f"expected digests, lengths and values, got {sorted(tensors)}")
    expected = ((torch.uint8, (len(lengths), DIGEST_BYTES)), (torch.int64, (len(lengths),)))
    found = tuple((x.dtype, tuple(x.shape)) for x in (digests, lengths))
    sizes = lengths.tolist()
    if (
        found != expected
        or values.dtype != torch.float32
        or values.shape != (sum(sizes),)
        or min([0, *sizes]) < 0
    ):
        raise ValueError(
            f"expected digests and lengths {expected}, got {found} and values {tuple(values.shape)}"
        )
    rows = digests.numpy()
    return {rows[i].tobytes(): part.clone() for i, part in enumerate(values.split(sizes))}


@final
class LogprobFiles:
    """The groups kept in `folder` under one key.

    Nothing here raises for the sake of a file: one that cannot be read is not there, and one that cannot
    be written is reported once.

    Args:
        folder: made when something is first written.
        key: hexadecimal SHA-256 of everything but the groups that the values depend on.
        max_bytes: of all such files in the folder together; the least recently used go first.
    """

    def __init__(self, folder: str | Path, key: str, *, max_bytes: int) -> None:
        self.folder = Path(folder)
        self.key = key
        self.max_bytes = max_bytes
        self._bytes: int | None = None  # in the folder, as far as this process knows; None before it looked
        self._writes = True

    def load(self) -> dict[bytes, Tensor]:
        """Every group that is whole. Many files become one."""
        groups: dict[bytes, Tensor] = {}
        read = []
        for path in sorted(self._files(f"{self.key}-*")):
            try:
                groups |= self._read(path)
            except (OSError, SafetensorError, ValueError) as error:
                logger.warning("%s: passed over, not a whole file of this cache: %s", path, error)
            else:
                read.append(path)
                with suppress(OSError):
                    os.utime(path)
        if len(read) > _MANY:
            whole = self.add(groups)
            for path in read if whole else ():
                if path != whole:
                    _remove(path)
            self._bytes = None
        return groups

    def add(self, groups: Mapping[bytes, Tensor]) -> Path | None:
        """Write groups as one file and return its path; None where the folder takes none."""
        if not self._writes:
            return None
        tensors = pack(groups)
        checksum = _checksum(self.key, tensors)
        path = self.folder / f"{self.key}-{checksum[:16]}.safetensors"
        partial = self.folder / f".{uuid.uuid4().hex}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata={"key": self.key, "sha256": checksum})
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            self._writes = False
            logger.warning("%s: log-probabilities are kept in memory only: %s", self.folder, error)
            _remove(partial)
            return None
        self._keep_within(path)
        return path

    def _read(self, path: Path) -> dict[bytes, Tensor]:
        if path.stat().st_size > self.max_bytes:
            raise ValueError(f"more than the {self.max_bytes:,} bytes allowed")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        if metadata.get("sha256") != _checksum(self.key, tensors):
            raise ValueError("its checksum does not match")
        return unpack(tensors)

    def _files(self, pattern: str) -> Iterable[Path]:
        return (path for path in self.folder.glob(pattern) if _OURS.fullmatch(path.name))

    def _keep_within(self, written: Path) -> None:
        """Remove the oldest files where the folder has outgrown its bound; `written` stays."""
        if self._bytes is not None:
            self._bytes += _facts(written)[1]
        if self._bytes is not None and self._bytes <= self.max_bytes:
            return
        for partial in self.folder.glob(".*.partial"):
            if _PARTIAL.fullmatch(partial.name) and time.time() - _facts(partial)[0] > _ABANDONED:
                _remove(partial)
        facts = {path: _facts(path) for path in self._files("*")}
        self._bytes = sum(size for _, size in facts.values())
        for path, (_, size) in sorted(facts.items(), key=lambda each: each[1]):
            if self._bytes > self.max_bytes and path != written:
                _remove(path)
                self._bytes -= size


def _facts(path: Path) -> tuple[float, int]:
    """(time of the last use, bytes); of a file that another process removed, now and none."""
    try:
        stat = path.stat()
    except OSError:
        return time.time(), 0
    return stat.st_mtime, stat.st_size


def _remove(path: Path) -> None:
    with suppress(OSError):  # another process was first, or may not
        path.unlink()


def _checksum(key: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(key.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
