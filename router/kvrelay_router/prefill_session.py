"""The Session with a prefill worker: opens requests, cancels them, releases tickets.

The session is the lease of its tickets. After a lost transport each open request is opened again under its attempt:
the worker re-attaches it and tells everything that it has told before, of which listeners hear only what is new.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from kvrelay.v1 import common_pb2, prefill_pb2
from kvrelay.v1.prefill_pb2_grpc import PrefillServiceStub
from kvrelay_core.errors import KvRelayError
from kvrelay_router.worker_session import WorkerSession


class PrefillListener(Protocol):
    def on_prefill(self, event: prefill_pb2.PrefillResponse) -> None: ...

    def on_prefill_lost(self, error: KvRelayError) -> None: ...


@dataclass(slots=True)
class _Open:
    request: prefill_pb2.PrefillRequest
    listener: PrefillListener
    told: set[str] = field(default_factory=set)  # kinds of event, each of which comes once

    @property
    def attempt(self) -> common_pb2.AttemptId:
        return self.request.attempt


class PrefillSession(WorkerSession[_Open]):
    role = "prefill"
    _last_words = frozenset({"cancel", "release"})

    def open(self, request: prefill_pb2.PrefillRequest, listener: PrefillListener) -> int:
        """Returns the handle. Raises UnavailableError when the worker does not serve now: nothing was sent."""
        entry = _Open(request, listener)
        handle = self._begin(entry)
        self._reattach(handle, entry)
        return handle

    def cancel(self, handle: int) -> None:
        if (entry := self._open.get(handle)) is not None:
            self._end(handle, self._last_word(handle, entry))

    def release(self, handle: int) -> None:
        """The ticket has no further use."""
        if (entry := self._open.get(handle)) is not None:
            message = prefill_pb2.HandleCancel(handle=handle, attempt=entry.attempt)
            self._end(handle, prefill_pb2.PrefillServiceSessionRequest(release=message))

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
        kind = response.event.WhichOneof("event")
        if kind in ("accepted", "finished"):
            if kind in entry.told:
                return
            entry.told.add(kind)
        elif kind == "failed":
            del self._open[response.handle]
        entry.listener.on_prefill(response.event)

    def _reattach(self, handle: int, entry: _Open) -> None:
        message = prefill_pb2.PrefillOpen(handle=handle, request=entry.request)
        self._send(prefill_pb2.PrefillServiceSessionRequest(open=message))

    def _last_word(self, handle: int, entry: _Open) -> Any:
        message = prefill_pb2.HandleCancel(handle=handle, attempt=entry.attempt)
        return prefill_pb2.PrefillServiceSessionRequest(cancel=message)

    def _tell_lost(self, entry: _Open, error: KvRelayError) -> None:
        entry.listener.on_prefill_lost(error)
