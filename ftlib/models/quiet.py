"""Silence for the bars that transformers draws while it reads and writes weights.

Verbosity is a global of those libraries and belongs to the user; nothing of it is changed here.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from threading import get_ident
from typing import Any

from transformers.utils import logging as transformers_logging

__all__ = ["quiet", "without_load_report"]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars from this thread in the scope; warnings, logs and other threads go on as before."""
    owner = get_ident()

    def disabled(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if get_ident() == owner:
            kwargs = kwargs | {"disable": True}
        return previous(factory, args, kwargs) if previous is not None else factory(*args, **kwargs)

    previous = transformers_logging.set_tqdm_hook(disabled)
    try:
        # The GGUF reader draws with tqdm itself, whose bars hold a carriage return: nothing else does.
        with redirect_stderr(_WithoutBars(owner)):
            yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


@contextmanager
def without_load_report() -> Iterator[None]:
    """No table from this thread of the weights that a checkpoint lacks: for a caller that tells them itself.

    Other messages, and those of other threads, are logged as before.
    """
    owner = get_ident()

    def kept(record: logging.LogRecord) -> bool:
        return get_ident() != owner or "LOAD REPORT" not in str(record.msg)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(kept)
    try:
        yield
    finally:
        logger.removeFilter(kept)


class _WithoutBars(io.TextIOBase):
    """The standard error stream less the lines that one thread redraws in place."""

    def __init__(self, owner: int) -> None:
        self._owner, self._stream = owner, sys.stderr
        self._in_bar = False

    def write(self, text: str) -> int:
        if get_ident() == self._owner and (text.startswith("\r") or (self._in_bar and text == "\n")):
            self._in_bar = text != "\n"
            return len(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()
