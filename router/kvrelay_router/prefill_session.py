"""The Session with a prefill worker: opens requests, cancels them, releases tickets.

The session is the lease of its tickets, so a lost one loses every open request at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from kvrelay.v1 import common_pb2, prefill_pb2
from kvrelay.v1.prefill_pb2_grpc import PrefillServiceStub
from kvrelay_core.errors import KvRelayError
from kvrelay_router.worker_session import WorkerSession


class PrefillListener(Protocol):
    def on_prefill(self, event: prefill_pb2.PrefillResponse) -> None: ...

    def on_prefill_lost(self, error: KvRelayError) -> None: ...


@dataclass(frozen=True, slots=True)
class _Open:
    attempt: common_pb2.AttemptId
    listener: PrefillListener


class PrefillSession(WorkerSession):
    role = "prefill"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._open: dict[int, _Open] = {}

    @property
    def num_open(self) -> int:
        return len(self._open)

    def open(self, request: prefill_pb2.PrefillRequest, listener: PrefillListener) -> int:
        """Returns the handle. Raises WorkerLostError when the worker does not serve now."""
        self._require_serving()
        handle = next(self._handles)
        self._open[handle] = _Open(request.attempt, listener)
        message = prefill_pb2.PrefillOpen(handle=handle, request=request)
        self._send(prefill_pb2.PrefillServiceSessionRequest(open=message))
        return handle

    def cancel(self, handle: int) -> None:
        if (entry := self._open.pop(handle, None)) is not None:
            message = prefill_pb2.HandleCancel(handle=handle, attempt=entry.attempt)
            self._send(prefill_pb2.PrefillServiceSessionRequest(cancel=message))

    def release(self, handle: int) -> None:
        """The ticket has no further use."""
        if (entry := self._open.pop(handle, None)) is not None:
            message = prefill_pb2.HandleCancel(handle=handle, attempt=entry.attempt)
            self._send(prefill_pb2.PrefillServiceSessionRequest(release=message))

    def forget(self, handle: int) -> None:
        """The worker holds nothing of the handle any more."""
        self._open.pop(handle, None)

    def _open_stream(self, channel: grpc.aio.Channel) -> Any:
        return PrefillServiceStub(channel).Session()

    def _hello(self, router_id: str) -> Any:
        return prefill_pb2.PrefillServiceSessionRequest(hello=prefill_pb2.SessionHello(router_id=router_id))

    def _welcome_of(self, response: Any) -> prefill_pb2.SessionWelcome | None:
        return response.welcome if response.HasField("welcome") else None

    def _receive(self, response: prefill_pb2.PrefillServiceSessionResponse) -> None:
        entry = self._open.get(response.handle)
        if entry is None or not response.HasField("event"):
            return  # of a request that is over here
        if response.event.HasField("failed"):
            del self._open[response.handle]
        entry.listener.on_prefill(response.event)

    def _connected(self, same_engine: bool) -> None:
        pass  # nothing survives a lost session

    def _disconnected(self, error: KvRelayError) -> None:
        self._lose_all(error)

    def _lose_all(self, error: KvRelayError) -> None:
        lost, self._open = self._open, {}
        for entry in lost.values():
            entry.listener.on_prefill_lost(error)
