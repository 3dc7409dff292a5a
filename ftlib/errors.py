"""The errors ftlib raises on purpose: one root, each also the built-in error it refines.

A message says where, what was expected, what was found and what to do.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "CapabilityError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FtlibError",
    "MissingPackageError",
    "NonFiniteError",
    "ShapeError",
]


class FtlibError(Exception):
    """Root of every error this library raises on purpose."""


class ShapeError(FtlibError, ValueError):
    """Tensors whose shapes or dtypes do not fit together."""


class ConfigError(FtlibError, ValueError):
    """An option that is unknown, out of range, without effect here, or clashing with another."""


class CapabilityError(FtlibError, ValueError):
    """A combination that cannot work; the message names the nearest one that does."""


class CheckpointError(FtlibError, RuntimeError):
    """A checkpoint that cannot be written, or fails verification when read."""


class NonFiniteError(FtlibError, ArithmeticError):
    """A loss, gradient or reward that is NaN or infinite; the weights were not touched."""


class MissingPackageError(FtlibError, ImportError):
    """An optional package is needed; the message gives the install command."""


class DataError(FtlibError, ValueError):
    """A value in the input cannot be used. The message starts with ``file:row:column``.

    Args:
        message: expected, found and fix, in that order.
        code: stable machine-readable kind, e.g. ``"bad_row"``.
        file: path, or ``"<list>"`` and the like for sources in memory.
        row: physical line, sheet row or 1-based element.
        sheet: sheet of a workbook; the message then starts with ``file:sheet!row``.
        column: field name, or 1-based character for parse faults.
        byte: byte offset for encoding faults.
        excerpt: at most 80 characters of what was found.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "bad_row",
        file: str | None = None,
        row: int | None = None,
        sheet: str | None = None,
        column: str | int | None = None,
        byte: int | None = None,
        excerpt: str | None = None,
    ) -> None:
        line = row if sheet is None else sheet if row is None else f"{sheet}!{row}"
        where = ":".join(str(part) for part in (file, line, column) if part is not None)
        super().__init__(f"{where}: {message}" if where else message)
        self.message = message
        self.code = code
        self.file = file
        self.row = row
        self.sheet = sheet
        self.column = column
        self.byte = byte
        self.excerpt = excerpt if excerpt is None else excerpt[:80]

    @property
    def fields(self) -> dict[str, Any]:
        """What makes this error, but for its message; the names of the arguments."""
        names = ("code", "file", "row", "sheet", "column", "byte", "excerpt")
        return {name: getattr(self, name) for name in names}

    def replaced(self, **changes: Any) -> DataError:
        """The same error with other fields or another message.

        Example:
            >>> str(DataError("expected text, got null.", column="text").replaced(file="a.jsonl", row=3))
            'a.jsonl:3:text: expected text, got null.'
        """
        return _rebuild(type(self), changes.pop("message", self.message), {**self.fields, **changes})

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.fields)


def _rebuild(cls: type[DataError], message: str, fields: dict[str, Any]) -> DataError:
    return cls(message, **fields)
