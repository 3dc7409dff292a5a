"""Files that appear whole or not at all, and never in the place of another."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import final

__all__ = ["Draft", "publish"]


@final
class Draft:
    """A file being written under a temporary name beside its final one.

    Args:
        path: the final name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._digest = hashlib.sha256()
        self._hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
        self._file = self._hidden.open("xb", buffering=1 << 20)

    @property
    def sha256(self) -> str:
        """Of what was written so far."""
        return self._digest.hexdigest()

    def write(self, text: str) -> None:
        """Add text in UTF-8, one row."""
        data = text.encode()
        self._digest.update(data)
        self._file.write(data)
        self.rows += 1

    def write_lines(self, lines: Iterable[str]) -> None:
        """Add rows, each with a line end."""
        for line in lines:
            self.write(line + "\n")

    def finish(self) -> None:
        """Everything is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def appear(self) -> None:
        """Take the final name.

        Raises:
            FileExistsError: it is taken.
        """
        try:
            os.link(self._hidden, self.path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with self.path.open("xb"):  # takes the name, or fails if it is taken
                pass
            self._hidden.replace(self.path)
        else:
            self._hidden.unlink()

    def discard(self) -> None:
        """Leave nothing behind under the temporary name."""
        self._file.close()
        self._hidden.unlink(missing_ok=True)


def publish(drafts: Iterable[Draft]) -> None:
    """All drafts under their final names, or none of them.

    Raises:
        FileExistsError: a name was taken meanwhile.
    """
    done: list[Path] = []
    try:
        for draft in drafts:
            draft.appear()
            done.append(draft.path)
    except BaseException:
        for path in done:
            path.unlink()
        raise
