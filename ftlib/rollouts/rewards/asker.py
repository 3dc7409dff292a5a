"""Many questions to a slow service: so many at once, so many a minute, each answer kept.

What a question is and how its answer reads belong to the caller. An answer that is an error is not kept,
so that asking again asks for the missing ones alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import time
from collections.abc import Awaitable, Callable, Hashable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from ftlib.errors import ConfigError
from ftlib.rollouts.rewards.calls import in_thread

__all__ = ["Ask", "Asker", "Question", "content_key"]

Ask = Callable[[str], str | Awaitable[str]]
"""A message to its reply, plain or ``async``."""


@final
@dataclass(frozen=True)
class Question:
    """One message, what its reply means, and the name under which the answer is kept."""

    key: str
    message: str
    parse: Callable[[str], float]


@final
class Asker:
    """Puts questions to `ask`.

    Args:
        ask: a message to its reply; a plain function runs in a thread.
        per_minute: most questions begun in a minute, > 0; None for no limit.
        timeout: seconds for one reply, > 0; None waits for ever.
        concurrency: questions open at once, >= 1.
        cache: key -> answer, read and written; None keeps one for the life of this object.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        per_minute: float | None,
        timeout: float | None,
        concurrency: int,
        cache: MutableMapping[str, float] | None,
    ) -> None:
        asked = {
            "per_minute None or > 0": per_minute is None or per_minute > 0,
            "timeout None or > 0": timeout is None or timeout > 0,
            "concurrency >= 1": concurrency >= 1,
        }
        failed = [rule for rule, holds in asked.items() if not holds]
        if failed:
            raise ConfigError(
                f"judge: expected {' and '.join(failed)}, got per_minute={per_minute}, timeout={timeout}, "
                f"concurrency={concurrency}."
            )
        self._ask, self._timeout, self._concurrency = ask, timeout, concurrency
        self._pause = 0.0 if per_minute is None else 60.0 / per_minute
        self._next_start = 0.0  # of the monotonic clock
        self._cache: MutableMapping[str, float] = {} if cache is None else cache

    async def answers(self, questions: Sequence[Question]) -> list[float]:
        """One answer per question; equal ones are asked once.

        Raises:
            TimeoutError: a reply that did not come in time.
            Exception: what `ask` or a parser raises; the answers that did come are kept.
        """
        missing = {each.key: each for each in questions if each.key not in self._cache}
        gate = asyncio.Semaphore(self._concurrency)
        results = await asyncio.gather(
            *(self._answer(each, gate) for each in missing.values()), return_exceptions=True
        )
        for key, result in zip(missing, results, strict=True):
            if not isinstance(result, BaseException):
                self._cache[key] = result
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return [self._cache[each.key] for each in questions]

    async def _answer(self, question: Question, gate: asyncio.Semaphore) -> float:
        async with gate:
            await self._turn()
            try:
                reply = await asyncio.wait_for(self._reply(question.message), self._timeout)
            except TimeoutError as error:
                raise TimeoutError(f"judge: no reply within {self._timeout} seconds") from error
        return question.parse(reply)

    async def _turn(self) -> None:
        """Wait until the next question may begin."""
        now = time.monotonic()
        start = max(now, self._next_start)
        self._next_start = start + self._pause
        if start > now:
            await asyncio.sleep(start - now)

    async def _reply(self, message: str) -> str:
        reply: Any = await asyncio.wrap_future(in_thread(partial(self._ask, message)))
        return str(await reply if inspect.isawaitable(reply) else reply)


def content_key(*parts: Hashable | Sequence[Any]) -> str:
    """A name for a question: the hash of what it is about."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
