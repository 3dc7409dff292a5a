"""What encoding does to the process while it lasts, and gives back.

`Dataset.map` with workers leaves a copy in place of `os.environ`: whoever imported the real one before, such
as a terminal library that looks up its width, would no longer see what is set afterwards. And a batch makes
hundreds of thousands of small objects that all stay: looking for garbage among them, again and again, takes
a third of the time.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["environment_kept", "no_garbage_collection"]

_CHANGED = "TOKENIZERS_PARALLELISM"  # what datasets sets for its workers


@contextmanager
def environment_kept() -> Iterator[None]:
    """`os.environ` is the same object with the same content after the scope."""
    environ, value = os.environ, os.environ.get(_CHANGED)
    try:
        yield
    finally:
        os.environ = environ  # noqa: B003  the object that everybody else holds
        if value is None:
            environ.pop(_CHANGED, None)
        else:
            environ[_CHANGED] = value


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Cyclic garbage waits until the scope ends; where it was off before, it stays off."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
