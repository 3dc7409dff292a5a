"""A file as bytes: found, of a known extension, and decompressed on the way."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

from ftlib.data.problems import InputNotFoundError
from ftlib.errors import DataError, MissingPackageError

__all__ = ["EXTENSIONS", "SourceFile", "source_file"]

EXTENSIONS = ("csv", "json", "jsonl", "parquet", "tsv", "txt", "xlsx")
_COMPRESSED = ("gz", "zst")
_MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst"}
_OLD_OFFICE = b"\xd0\xcf\x11\xe0"  # .xls, and workbooks with a password
_CHUNK = 1 << 16


@final
@dataclass(frozen=True)
class SourceFile:
    """A file that is there.

    Args:
        path: where.
        extension: one of `EXTENSIONS`, without what says that it is compressed.
        compression: ``gz``, ``zst`` or `None`, by content.
    """

    path: Path
    extension: str
    compression: str | None

    @property
    def name(self) -> str:
        """The path as errors show it."""
        return str(self.path)

    def open(self) -> BinaryIO:
        """The bytes, decompressed.

        Raises:
            DataError: while reading, ``file_corrupt``.
        """
        file = self.path.open("rb")
        if self.compression is None:
            return file
        return io.BufferedReader(_Decompressed(file, self.name, self.compression), _CHUNK)

    def read(self) -> bytes:
        """All of it."""
        with self.open() as file:
            return file.read()

    def head(self, size: int) -> bytes:
        """The first bytes."""
        with self.open() as file:
            return file.read(size)

    def corrupt(self, kind: str, found: str) -> DataError:
        """The error of a file that is no whole `kind`."""
        return DataError(
            f"expected a whole {kind} file, got {found}. Copy the file again.",
            code="file_corrupt",
            file=self.name,
            byte=self.path.stat().st_size,
        )


def source_file(path: Path) -> SourceFile:
    """The file at `path`.

    Raises:
        DataError: ``input_not_found``, ``unsupported_format``, ``file_corrupt`` or ``empty_data``.
        MissingPackageError: `.zst` without the package for it.
    """
    if not path.is_file():
        found = "a directory" if path.is_dir() else "nothing there"
        raise InputNotFoundError(
            f"expected a file, found {found}. Check the path.", code="input_not_found", file=str(path)
        )
    with path.open("rb") as opened:
        magic = opened.read(4)
    parts = [suffix.removeprefix(".").lower() for suffix in path.suffixes[-2:]]
    said = parts.pop() if parts and parts[-1] in _COMPRESSED else None
    extension = parts[-1] if parts else ""
    if extension == "xls" or magic == _OLD_OFFICE:
        raise _unsupported(path, "an old Excel workbook (.xls)", "Save it as .xlsx without a password.")
    if extension not in EXTENSIONS:
        raise _unsupported(
            path,
            f"{'.' + extension if extension else 'no extension'!r}",
            "Convert the file, or pass a datasets.Dataset.",
        )
    if not magic:
        raise DataError("expected rows, got an empty file.", code="empty_data", file=str(path))
    compression = next((name for mark, name in _MAGIC.items() if magic.startswith(mark)), None)
    file = SourceFile(path, extension, compression)
    if said is not None and compression != said:
        raise file.corrupt(f".{said}", f"the bytes {magic.hex(' ')} at its start")
    return file


def _unsupported(path: Path, found: str, fix: str) -> DataError:
    known = ", ".join(f".{extension}" for extension in EXTENSIONS)
    return DataError(
        f"expected one of {known}, perhaps with .gz or .zst, got {found}. {fix}",
        code="unsupported_format",
        file=str(path),
    )


class _Decompressed(io.RawIOBase):
    """Decompressed bytes of gzip or zstd, any number of members; a cut or false member is an error."""

    def __init__(self, file: BinaryIO, name: str, kind: str) -> None:
        self._file, self._name, self._kind = file, name, kind
        self._decoder, self._error = _decoder(kind)
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._decoder.unused_data if self._decoder.eof else b""
            chunk = chunk.lstrip(b"\0") or self._file.read(_CHUNK)  # zeros pad the end of some files
            if not chunk:
                if not self._decoder.eof:
                    raise self._corrupt("its end is missing")
                return 0
            if self._decoder.eof:
                self._decoder, _ = _decoder(self._kind)
            try:
                self._ready = self._decoder.decompress(chunk)
            except self._error as error:
                raise self._corrupt(str(error)) from error
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _corrupt(self, found: str) -> DataError:
        return DataError(
            f"expected a whole .{self._kind} file, got one that breaks off: {found}. Copy the file again.",
            code="file_corrupt",
            file=self._name,
            byte=self._file.tell(),
        )


def _decoder(kind: str) -> tuple[Any, type[Exception]]:
    """One member's decoder, with `decompress`, `eof` and `unused_data`, and the error it raises."""
    if kind == "gz":
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16), zlib.error  # 16: with the gzip header
    try:
        import zstandard
    except ImportError as error:
        raise MissingPackageError(
            "expected the package zstandard for .zst files, found none. pip install 'ftlib[zstd]'."
        ) from error
    return zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError
