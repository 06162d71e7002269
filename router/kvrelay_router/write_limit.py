"""How long one message may wait for its client: a time limit for each write that costs one timer for all of them.

A timer for each write would be a tenth of what the router spends on a token.
"""

from __future__ import annotations

import asyncio
from types import TracebackType


class WriteLimit:
    """`async with` around the writes, and `begin` and `end` around each; TimeoutError when one takes too long."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None
        self._began_s: float | None = None  # None: nothing is being written

    def begin(self) -> None:
        self._began_s = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._limit_s, self._check)

    def end(self) -> None:
        self._began_s = None

    def _check(self) -> None:
        self._timer = None
        if self._began_s is None:
            return  # the next write sets the timer again
        due_s = self._began_s + self._limit_s
        if due_s <= self._loop.time():
            self._timeout.reschedule(due_s)
        else:
            self._timer = self._loop.call_at(due_s, self._check)

    async def __aenter__(self) -> WriteLimit:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._timeout.__aexit__(kind, error, trace)
