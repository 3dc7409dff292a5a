"""Hashes of everything that decides an encoding, so that a cache never answers for another; and its place."""

from __future__ import annotations

import hashlib
import inspect
import io
import os
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from datasets.fingerprint import Hasher
from datasets.utils._dill import Pickler

__all__ = ["cache_file", "code_fingerprint", "identity"]


def identity(value: Any) -> str:
    """A hash of a formatter or function, of its source text too where there is one."""
    code = value if inspect.isroutine(value) else type(value)
    try:
        source = inspect.getsource(code)
    except (OSError, TypeError):
        source = ""
    return f"{_hashed(value)}:{hashlib.blake2b(source.encode(), digest_size=8).hexdigest()}"


class _Pickler(Pickler):
    """What datasets hashes, with frozensets in sorted order: the set in ``x in {"a", "b"}`` is one."""

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if type(obj) is frozenset:
            obj = ("frozenset", sorted(map(_hashed, obj)))
        super().save(obj, save_persistent_id)


def _hashed(value: Any) -> str:
    file = io.BytesIO()
    _Pickler(file, recurse=True).dump(value)
    return str(Hasher.hash_bytes(file.getvalue()))


def code_fingerprint() -> str:
    """A hash of this package's source: a changed encoder never finds an old one's cache."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(_files(resources.files("ftlib.data")), key=lambda file: (file.name, str(file))):
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _files(folder: Traversable) -> Iterator[Traversable]:
    """The files of a folder and of those in it."""
    for entry in folder.iterdir():
        yield from _files(entry) if entry.is_dir() else [entry]


def cache_file(records: Dataset, fingerprint: str) -> str | None:
    """Where to cache the encoding of records that lie in memory; `None` leaves it to datasets."""
    if records.cache_files or not datasets.is_caching_enabled():
        return None
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "ftlib"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: no cache, rather than no training
        return None
    return str(folder / f"{fingerprint}.arrow") if os.access(folder, os.W_OK) else None
