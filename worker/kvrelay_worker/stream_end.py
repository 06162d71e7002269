"""The end of an RPC on the server, however it came about."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import grpc

from kvrelay_core.errors import InternalError
from kvrelay_worker.outbox import Outbox

P = ParamSpec("P")
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


async def guard_stream(
    outbox: Outbox[Any], read: Callable[P, Coroutine[object, object, None]], *args: P.args, **kwargs: P.kwargs
) -> None:
    """Runs a stream's reader. One that breaks ends its stream with it: nobody would hear the client any more."""
    try:
        await read(*args, **kwargs)
    except Exception as error:
        outbox.fail(InternalError(f"unexpected {type(error).__name__} while reading the stream; see the worker's log"))
        raise  # for its owner, who logs it
