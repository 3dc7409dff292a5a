"""Run a function in a forked child, where it may be killed, limited or signalled.

Forking takes milliseconds; a fresh interpreter would import torch again for every test.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

__all__ = ["Ended", "fork", "in_child"]


class Ended(NamedTuple):
    """How a child ended: its exit status, minus the signal that killed it, and what its function said."""

    status: int
    said: list[str]


def in_child(function: Callable[[Callable[[object], None]], None]) -> Ended:
    """Call `function(say)` in a child and wait for its end; an exception there is said, with status 1."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "said"
        out.touch()
        pid = fork(lambda: function(lambda text: _append(out, text)), out)
        _, status = os.waitpid(pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), out.read_text().splitlines())


def fork(function: Callable[[], None], errors: Path) -> int:
    """Start `function()` in a child and return its process id. Tracebacks go to the file `errors`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child computes with no thread of torch's
        pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001  the child ends here, whatever happened
        _append(errors, traceback.format_exc())
    finally:
        os._exit(status)  # no clean-up of pytest's in the child


def _append(path: Path, text: object) -> None:
    with path.open("a") as file:
        file.write(f"{text}\n")
