"""The manifest of a checkpoint folder, and reading a folder only as far as its manifest vouches for it.

A folder is valid when ``manifest.json`` is a known format, the files beside it are exactly those it
names, and each has the size and SHA-256 it states. The step comes from the manifest, never from the
folder's name. Links are refused, and so is any name that is not a plain file inside the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any, NamedTuple

from ftlib.engine.files import fsync_file, load_state, save_state, sha256
from ftlib.errors import CheckpointError

__all__ = [
    "FORMAT",
    "MANIFEST",
    "PREFIX",
    "Newest",
    "list_files",
    "newest_valid",
    "read_manifest",
    "seal_files",
    "verify",
    "versions",
    "write_manifest",
]

FORMAT = 1  # readers for every format written by a release of the same major version stay
MANIFEST = "manifest.json"
PREFIX = "checkpoint-"
_OWN_KEYS = frozenset({"format", "run_id", "step", "best", "written", "folder_fsync", "files"})


class Newest(NamedTuple):
    """What `newest_valid` found.

    Args:
        path: the newest folder that verified, None when there is none.
        manifest: its manifest, None likewise.
        skipped: (folder, reason) of every folder that would have come before it.
        runs: ids of the runs found, the one written to last first.
    """

    path: Path | None
    manifest: dict[str, Any] | None
    skipped: list[tuple[Path, str]]
    runs: tuple[str, ...] = ()


def newest_valid(folder: str | Path, *, prefer: Callable[[Mapping[str, Any]], bool] | None = None) -> Newest:
    """The newest checkpoint that passes every check, and why others were skipped.

    Those that `prefer` is true for come first; then the run that was written to last; then the highest step;
    of several of one step, the one written last.

    Args:
        folder: an output folder, of one run or several; one that does not exist holds no checkpoints.
        prefer: asked of each manifest; None is true for all.
    """
    skipped: list[tuple[Path, str]] = []
    found: list[tuple[Path, dict[str, Any]]] = []
    for path in sorted(Path(folder).glob(f"{PREFIX}*")):
        try:
            if path.is_symlink():
                raise CheckpointError(f"{path}: expected a folder, got a link.")
            found.append((path, read_manifest(path)))
        except CheckpointError as error:
            skipped.append((path, str(error)))
    written: dict[str, float] = {}  # by run, when last
    for _, manifest in found:
        run = manifest["run_id"]
        written[run] = max(written.get(run, 0.0), manifest.get("written", 0.0))
    runs = tuple(sorted(written, key=written.__getitem__, reverse=True))

    def order(candidate: tuple[Path, dict[str, Any]]) -> tuple[bool, float, int, float, str]:
        path, manifest = candidate
        preferred, when = prefer is None or prefer(manifest), manifest.get("written", 0.0)
        return preferred, written[manifest["run_id"]], manifest["step"], when, path.name

    for path, _ in sorted(found, key=order, reverse=True):
        try:
            return Newest(path, verify(path), skipped, runs)
        except CheckpointError as error:
            skipped.append((path, str(error)))
    return Newest(None, None, skipped, runs)


def verify(path: str | Path, *, hashes: bool = True) -> dict[str, Any]:
    """Check one checkpoint folder against its manifest and return the manifest.

    Args:
        path: a checkpoint folder, named by the caller or found by `newest_valid`.
        hashes: compare SHA-256 too; without it only the set of files and their sizes.

    Raises:
        CheckpointError: names the file that is missing, extra, linked, of another size or altered.
    """
    path = Path(path)
    manifest = read_manifest(path)
    stated: dict[str, dict[str, Any]] = manifest["files"]
    found = list_files(path)
    found.remove(MANIFEST)
    for name in sorted(set(found) ^ set(stated)):
        wanted, got = (
            ("present", "no such file") if name in stated else ("absent", "a file not in the manifest")
        )
        raise _broken(path / name, wanted, got)
    for name, entry in stated.items():
        size = (path / name).stat().st_size
        if size != entry["bytes"]:
            raise _broken(path / name, f"{entry['bytes']:,} bytes", f"{size:,}")
        if hashes and (digest := sha256(path / name)) != entry["sha256"]:
            raise _broken(path / name, f"SHA-256 {entry['sha256'][:16]}…", f"{digest[:16]}…")
    return manifest


def read_manifest(path: str | Path) -> dict[str, Any]:
    """Read and check a folder's manifest by itself, without looking at the files it names.

    Raises:
        CheckpointError: no folder, no manifest, another format, or an entry that makes no sense.
    """
    file = Path(path) / MANIFEST
    if not Path(path).is_dir():
        raise CheckpointError(
            f"{path}: expected a checkpoint folder, got {_kind(Path(path))}. Name an existing one."
        )
    if file.is_symlink() or not file.is_file():
        raise CheckpointError(
            f"{file}: expected a manifest, got {_kind(file)}. The checkpoint was not completed."
        )
    manifest = load_state(file)
    if manifest.get("format") != FORMAT:
        raise _broken(
            file, f"format {FORMAT}", f"{manifest.get('format')!r}", "Read it with the version that wrote it"
        )
    if type(manifest.get("step")) is not int or manifest["step"] < 0:
        raise _broken(file, "a step >= 0", f"{manifest.get('step')!r}")
    if type(manifest.get("run_id")) is not str:
        raise _broken(file, "a run id", f"{manifest.get('run_id')!r}")
    if type(manifest.get("written", 0.0)) not in (int, float):  # absent in checkpoints of 0.1
        raise _broken(file, "a time in seconds", f"{manifest['written']!r:.80}")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise _broken(file, "a table of files", f"{type(files).__name__}")
    for name, entry in files.items():
        _check_entry(file, name, entry)
    return manifest


def seal_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Flush and hash every file of a flat folder: name -> bytes and SHA-256, as a manifest states them.

    Raises:
        CheckpointError: a link or a folder among them.
    """
    files = {}
    for name in sorted(list_files(folder)):
        fsync_file(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    return files


def write_manifest(folder: Path, own: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Write the manifest and flush it. It comes last: a folder without one was not completed.

    Args:
        folder: folder whose files are written and flushed.
        own: run_id, step, best, written (seconds since 1970), folder_fsync and files, as the store
            knows them.
        given: what the engine adds: versions, config, data fingerprint and the like.

    Raises:
        CheckpointError: a given key that the store owns.
    """
    if clash := sorted(_OWN_KEYS & set(given)):
        raise CheckpointError(f"{MANIFEST}: the keys {clash} are the store's own. Rename yours.")
    save_state(folder / MANIFEST, {"format": FORMAT, **own, **given}, indent=1)
    fsync_file(folder / MANIFEST)


def list_files(folder: Path) -> list[str]:
    """Names of the regular files in a folder.

    Raises:
        CheckpointError: anything else in there, such as a link or a folder.
    """
    names = []
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_file():
            raise _broken(path, "a regular file", _kind(path))
        names.append(path.name)
    return names


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose numbers decide whether a run repeats bit for bit."""
    found = {"python": python_version()}
    for package in ("ftlib", "torch", "transformers", "peft", "accelerate", "safetensors", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            found[package] = "unknown"
    return found


def _check_entry(file: Path, name: str, entry: Any) -> None:
    plain = name not in ("", ".", "..", MANIFEST) and not set(name) & set("/\\:\0")
    if not plain:
        raise _broken(
            file, "plain file names", json.dumps(name), "Do not load it: it may come from an attacker"
        )
    good = isinstance(entry, dict) and type(entry.get("bytes")) is int and type(entry.get("sha256")) is str
    if not good:
        raise _broken(file, f"bytes and sha256 of {name}", f"{entry!r:.80}")


def _kind(path: Path) -> str:
    if path.is_symlink():
        return "a link"
    if path.is_dir():
        return "a folder"
    return (
        "a special file" if path.exists() and not path.is_file() else "a file" if path.exists() else "nothing"
    )


def _broken(path: Path, expected: str, found: str, fix: str = "Use another checkpoint") -> CheckpointError:
    return CheckpointError(f"{path}: expected {expected}, got {found}. {fix}.")
