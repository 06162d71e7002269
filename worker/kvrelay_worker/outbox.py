"""A bounded queue in front of one stream's writer: putting never waits, so that nobody waits for a slow client.

A receiver that is too far behind loses what is queued and gets a typed error instead (PROTOCOL C7). One task
iterates; knows nothing of what the messages mean.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from kvrelay_core.errors import KvRelayError, OverloadedError

T = TypeVar("T")

DEFAULT_LIMIT = 4096


class Outbox(Generic[T]):
    def __init__(self, limit: int = DEFAULT_LIMIT, on_overflow: Callable[[], None] | None = None) -> None:
        """`limit` counts messages. `on_overflow` is called once, when the receiver is given up."""
        self._limit = limit
        self._on_overflow = on_overflow
        self._items: deque[T] = deque()
        self._changed = asyncio.Event()
        self._error: KvRelayError | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._items)

    @property
    def is_closed(self) -> bool:
        return self._closed

    def put(self, item: T) -> None:
        """Queues the message; drops it when the stream is closed."""
        if self._closed:
            return
        if len(self._items) >= self._limit:
            behind = len(self._items)
            self.fail(OverloadedError(f"the receiver is {behind} messages behind; read faster or ask for less"))
            if self._on_overflow is not None:
                self._on_overflow()
            return
        self._items.append(item)
        self._changed.set()

    def close(self, error: KvRelayError | None = None) -> None:
        """The iteration ends, with the error if there is one, after what is queued. The first call counts."""
        if self._closed:
            return
        self._closed = True
        self._error = error
        self._changed.set()

    def fail(self, error: KvRelayError) -> None:
        """Drops what is queued and closes with the error. Without effect on a closed outbox."""
        if not self._closed:
            self._items.clear()
            self.close(error)

    def __aiter__(self) -> Outbox[T]:
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self._error is not None:
                raise self._error
            if self._closed:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        return self._items.popleft()
