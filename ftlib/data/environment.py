"""The process's environment as it was: `Dataset.map` with workers leaves a copy in place of `os.environ`.

Whoever imported the real one before, such as a terminal library that looks up its width, would no longer
see what is set afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["environment_kept"]

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
