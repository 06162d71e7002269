"""The Session with a decode worker: opens, resumes and aborts requests, and hands out their tokens.

Decode goes on while the transport is lost; within `reattach_s` the router comes back and names, per request, the
next position that it needs (PROTOCOL C7). Later, or when the engine restarted meanwhile, the requests are lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc

from kvrelay.v1 import common_pb2, decode_pb2
from kvrelay.v1.decode_pb2_grpc import DecodeServiceStub
from kvrelay.v1.prefill_pb2 import SessionHello, SessionWelcome
from kvrelay_core.errors import KvRelayError, WorkerLostError
from kvrelay_router.worker_session import WorkerSession


class DecodeListener(Protocol):
    def on_token(
        self, choice: int, position: int, token_id: int, logprobs: common_pb2.TokenLogprobs | None
    ) -> None: ...

    def on_decode(self, event: decode_pb2.DecodeEvent) -> None: ...

    def on_decode_lost(self, error: KvRelayError) -> None: ...

    def next_positions(self) -> Mapping[int, int]:
        """Choice index -> first position that is still needed."""
        ...


@dataclass(slots=True)
class _Open:
    attempt: common_pb2.AttemptId
    listener: DecodeListener
    # Kept until the worker answers: after a lost transport nobody knows whether it arrived.
    unanswered: decode_pb2.DecodeServiceSessionRequest | None


class DecodeSession(WorkerSession):
    role = "decode"

    def __init__(self, *args: Any, reattach_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._open: dict[int, _Open] = {}
        self._reattach_s = reattach_s
        self._giving_up: asyncio.TimerHandle | None = None

    @property
    def num_open(self) -> int:
        return len(self._open)

    def open(self, start: decode_pb2.DecodeStart, listener: DecodeListener) -> int:
        """Returns the handle. Raises WorkerLostError when the worker does not serve now."""
        self._require_serving()
        handle = next(self._handles)
        message = decode_pb2.DecodeServiceSessionRequest(open=decode_pb2.DecodeOpen(handle=handle, start=start))
        self._open[handle] = _Open(start.attempt, listener, message)
        self._send(message)
        return handle

    def resume(self, handle: int, resume: decode_pb2.DecodeResume) -> None:
        """The answer to HandoffLost. Without effect when the handle was lost meanwhile; its listener was told."""
        if (entry := self._open.get(handle)) is not None:
            entry.attempt = resume.attempt
            message = decode_pb2.DecodeResumeHandle(handle=handle, resume=resume)
            entry.unanswered = decode_pb2.DecodeServiceSessionRequest(resume=message)
            self._send(entry.unanswered)

    def abort(self, handle: int, reason: str) -> None:
        if (entry := self._open.pop(handle, None)) is not None:
            message = decode_pb2.DecodeAbortHandle(handle=handle, attempt=entry.attempt, reason=reason)
            self._send(decode_pb2.DecodeServiceSessionRequest(abort=message))

    def forget(self, handle: int) -> None:
        """The worker holds nothing of the handle any more."""
        self._open.pop(handle, None)

    def _open_stream(self, channel: grpc.aio.Channel) -> Any:
        return DecodeServiceStub(channel).Session()

    def _hello(self, router_id: str) -> Any:
        return decode_pb2.DecodeServiceSessionRequest(hello=SessionHello(router_id=router_id))

    def _welcome_of(self, response: Any) -> SessionWelcome | None:
        return response.welcome if response.HasField("welcome") else None

    def _receive(self, response: decode_pb2.DecodeServiceSessionResponse) -> None:
        if response.HasField("tokens"):
            self._receive_tokens(response.tokens)
        elif response.HasField("event"):
            self._receive_event(response.event.handle, response.event.event)

    def _receive_event(self, handle: int, event: decode_pb2.DecodeEvent) -> None:
        entry = self._open.get(handle)
        if entry is None:
            return  # of a request that is over here
        entry.unanswered = None
        if event.WhichOneof("event") in ("failed", "handed_back"):
            del self._open[handle]
        entry.listener.on_decode(event)

    def _receive_tokens(self, step: decode_pb2.StepTokens) -> None:
        rows = zip(step.handles, step.choices, step.positions, step.token_ids, strict=True)
        for row, (handle, choice, position, token_id) in enumerate(rows):
            # Looked up for each row: a token may end its request.
            entry = self._open.get(handle)
            if entry is not None:
                entry.unanswered = None
                logprobs = step.logprobs[row] if step.logprobs else None
                entry.listener.on_token(choice, position, token_id, logprobs)

    def _connected(self, same_engine: bool) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None
        if not same_engine:
            self._lose_all(self._restarted())
        for handle, entry in list(self._open.items()):
            if entry.unanswered is None:
                self._send(self._reattach(handle, entry))
            elif entry.unanswered.HasField("open"):
                self._send(entry.unanswered)  # the same attempt re-attaches
            else:
                # Whether the resume arrived, and so which attempt lives there, is not known.
                self.abort(handle, "the session was lost while the request resumed")
                entry.listener.on_decode_lost(self._restarted())

    def _reattach(self, handle: int, entry: _Open) -> decode_pb2.DecodeServiceSessionRequest:
        message = decode_pb2.DecodeReattach(
            handle=handle, attempt=entry.attempt, next_positions=entry.listener.next_positions()
        )
        return decode_pb2.DecodeServiceSessionRequest(reattach=message)

    def _restarted(self) -> KvRelayError:
        return WorkerLostError(f"decode worker {self.worker_id} restarted or lost the request", peer=self.key)

    def _disconnected(self, error: KvRelayError) -> None:
        if self._open and self._giving_up is None:
            loop = asyncio.get_running_loop()
            self._giving_up = loop.call_later(self._reattach_s, self._give_up, error)

    def _give_up(self, error: KvRelayError) -> None:
        self._giving_up = None
        self._lose_all(error)

    def _lose_all(self, error: KvRelayError) -> None:
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None
        lost, self._open = self._open, {}
        for entry in lost.values():
            entry.listener.on_decode_lost(error)
