"""The end of an RPC on the server, however it came about."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc

T = TypeVar("T")

Context = grpc.aio.ServicerContext[Any, Any]


def at_stream_end(context: Context, callback: Callable[[], None]) -> None:
    """Calls back once the RPC is over. A handler's own `finally` may run late: when the client vanishes while a
    message is being written, the handler's generator is closed only by the garbage collector."""
    run: Any = lambda _: callback()  # noqa: E731  (the stubs' type of a callback is a class that nothing can be)
    context.add_done_callback(run)


async def until_stream_end(requests: AsyncIterator[T]) -> AsyncIterator[T]:
    """The client's messages, for a reader beside the handler: also when the handler ends the RPC meanwhile."""
    try:
        async for request in requests:
            yield request
    except (grpc.aio.UsageError, grpc.aio.AbortError):
        return  # it was finished, or aborted with an error
