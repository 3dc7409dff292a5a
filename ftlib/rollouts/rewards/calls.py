"""Calling functions that may be ``async``, slow or failing, from code that is neither."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["in_thread", "wait_for"]

T = TypeVar("T")


def in_thread(function: Callable[[], T]) -> Future[T]:
    """Start a function in a thread that does not keep the interpreter from ending, as a pool's would."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # from here on nobody can cancel it, only stop waiting

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001  raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def wait_for(function: Callable[[], Any], timeout: float | None = None) -> Any:
    """The result of a function, awaited if it is awaitable.

    Works inside a running event loop, as in a notebook: the call then has a thread and a loop of its own.

    Args:
        function: without arguments.
        timeout: in seconds; None waits for ever. A function that is late is left to its thread.

    Raises:
        TimeoutError: no result in time.
    """
    if timeout is None and not _loop_runs():
        return _finished(function)
    future = in_thread(lambda: _finished(function))
    try:
        return future.result(timeout)
    except TimeoutError:
        if future.done():  # the function's own
            raise
        raise TimeoutError(f"no result within {timeout} seconds") from None


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _finished(function: Callable[[], Any]) -> Any:
    result = function()
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Awaitable[T]) -> T:
    return await result
