"""Who asked a run to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from ftlib.engine.determinism import StopFlag, stop_signals

__all__ = ["Stops"]


@final
class Stops:
    """Requests to stop: by a signal, a callback, `stop()` or another rank. The first who asks is named.

    Outside `listening` nothing runs, so nothing is stopped.
    """

    def __init__(self) -> None:
        self._flag: StopFlag | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hears SIGTERM and SIGINT, and `ask`, for as long as it is entered."""
        with stop_signals() as flag:
            self._flag = flag
            try:
                yield
            finally:
                self._flag = None

    @property
    def by(self) -> str | None:
        """Who asked; None for nobody."""
        return None if self._flag is None else self._flag.stopped_by

    @property
    def asked(self) -> bool:
        """Whether anybody did."""
        return self.by is not None

    def ask(self, by: str) -> None:
        """Stop at the next chance, in the name of `by`."""
        if self._flag is not None and self._flag.stopped_by is None:
            self._flag.stopped_by = by
