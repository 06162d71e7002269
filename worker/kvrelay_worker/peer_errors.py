"""Failed calls to a peer as errors of our tree."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from kvrelay_core.errors import DeadlineError, RequestCancelledError, WorkerLostError
from kvrelay_core.rpc.status import error_from_rpc

RETRY_PAUSE_S = 0.05  # before a lost peer is called again


@contextmanager
def peer_errors(address: str) -> Iterator[None]:
    """A peer that stops, does not answer in time or whose channel is closed is lost; its typed errors pass."""
    try:
        yield
    except grpc.RpcError as error:
        typed = error_from_rpc(error, address)
        if isinstance(typed, RequestCancelledError | DeadlineError):
            raise WorkerLostError(f"{address} ended the call: {typed.message}", peer=address) from error
        raise typed from error
    except grpc.aio.UsageError as error:
        # What a call on a closed channel raises, which is no RpcError.
        raise WorkerLostError(f"the channel to {address} was closed", peer=address) from error
    except asyncio.CancelledError:
        # gRPC raises it too when the channel is closed under a call: then nobody cancelled this task.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise WorkerLostError(f"the channel to {address} was closed", peer=address) from None
