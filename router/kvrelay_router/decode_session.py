"""The Session with a decode worker: opens, resumes and aborts requests, and hands out their tokens.

After a lost transport the router names, per request, the next position that it needs (PROTOCOL C7). What the worker
may not have got is said again: an open as it is, the answer to a lost hand-off when the worker asks once more (C3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from kvrelay.v1 import common_pb2, decode_pb2
from kvrelay.v1.decode_pb2_grpc import DecodeServiceStub
from kvrelay.v1.prefill_pb2 import SessionHello, SessionWelcome
from kvrelay_core.errors import KvRelayError, SupersededError
from kvrelay_core.rpc.status import error_from_detail
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
    # An open or resume that the worker has not answered: after a lost transport nobody knows whether it arrived.
    unanswered: decode_pb2.DecodeServiceSessionRequest | None
    lost_attempt: common_pb2.AttemptId | None = None  # which the unanswered resume supersedes
    is_asking: bool = False  # whether the worker has got the resume
    aborted: set[int] = field(default_factory=set)  # choices


class DecodeSession(WorkerSession[_Open]):
    role = "decode"
    _last_words = frozenset({"abort"})

    def open(self, start: decode_pb2.DecodeStart, listener: DecodeListener) -> int:
        """Returns the handle. Raises UnavailableError when the worker does not serve now: nothing was sent."""
        entry = _Open(start.attempt, listener, None)
        handle = self._begin(entry)
        opening = decode_pb2.DecodeOpen(handle=handle, start=start)
        entry.unanswered = decode_pb2.DecodeServiceSessionRequest(open=opening)
        self._send(entry.unanswered)
        return handle

    def resume(self, handle: int, resume: decode_pb2.DecodeResume) -> None:
        """The answer to HandoffLost. Without effect when the handle was lost meanwhile; its listener was told."""
        if (entry := self._open.get(handle)) is not None:
            entry.lost_attempt, entry.attempt = entry.attempt, resume.attempt
            message = decode_pb2.DecodeResumeHandle(handle=handle, resume=resume)
            entry.unanswered = decode_pb2.DecodeServiceSessionRequest(resume=message)
            self._send(entry.unanswered)

    def abort(self, handle: int, reason: str) -> None:
        if (entry := self._open.get(handle)) is not None:
            self._end(handle, _abort(handle, entry, reason))

    def abort_choices(self, handle: int, choices: Iterable[int]) -> None:
        """The others go on. Without effect when the handle was lost meanwhile."""
        if (entry := self._open.get(handle)) is not None:
            entry.aborted.update(choices)
            self._send_aborted(handle, entry)

    def _open_stream(self, channel: grpc.aio.Channel) -> Any:
        return DecodeServiceStub(channel).Session()

    def _hello(self, router_id: str) -> Any:
        return decode_pb2.DecodeServiceSessionRequest(hello=SessionHello(router_id=router_id))

    def _welcome_of(self, response: Any) -> SessionWelcome | None:
        return response.welcome if response.HasField("welcome") else None

    # ------------------------------------------------------------------------------------ messages

    def _receive(self, response: decode_pb2.DecodeServiceSessionResponse) -> None:
        if response.HasField("tokens"):
            self._receive_tokens(response.tokens)
        elif response.HasField("event"):
            self._receive_event(response.event.handle, response.event.event)

    def _receive_event(self, handle: int, event: decode_pb2.DecodeEvent) -> None:
        entry = self._open.get(handle)
        if entry is None:
            return  # of a request that is over here
        if entry.is_asking and self._hear_of_resume(handle, entry, event):
            return
        entry.unanswered = None
        if event.WhichOneof("event") in ("failed", "handed_back"):
            del self._open[handle]
        entry.listener.on_decode(event)

    def _receive_tokens(self, step: decode_pb2.StepTokens) -> None:
        rows = zip(step.handles, step.choices, step.positions, step.token_ids, strict=True)
        for row, (handle, choice, position, token_id) in enumerate(rows):
            # Looked up for each row: a token may end its request.
            entry = self._open.get(handle)
            if entry is not None and not entry.is_asking:
                entry.unanswered = None
                logprobs = step.logprobs[row] if step.logprobs else None
                entry.listener.on_token(choice, position, token_id, logprobs)

    # -------------------------------------------------------------------------------------- return

    def _reattach(self, handle: int, entry: _Open) -> None:
        if entry.unanswered is None:
            self._send_reattach(handle, entry, entry.attempt)
        elif entry.lost_attempt is None:
            self._send(entry.unanswered)  # the same attempt re-attaches
            self._send_aborted(handle, entry)
        else:
            # Asked for under the lost attempt, the worker asks once more if the resume has not arrived.
            entry.is_asking = True
            self._send_reattach(handle, entry, entry.lost_attempt)

    def _hear_of_resume(self, handle: int, entry: _Open, event: decode_pb2.DecodeEvent) -> bool:
        """Takes the worker's word on the attempt that lost its hand-off; False when it is for the listener."""
        match event.WhichOneof("event"):
            case "handoff_lost":
                entry.is_asking = False
                self._send(entry.unanswered)
                return True
            case "failed" if isinstance(error_from_detail(event.failed), SupersededError):
                entry.is_asking, entry.unanswered = False, None  # it had arrived
                self._send_reattach(handle, entry, entry.attempt)
                return True
            case "failed" | "handed_back":
                return False
            case _:
                return True  # of the lost attempt

    def _send_reattach(self, handle: int, entry: _Open, attempt: common_pb2.AttemptId) -> None:
        needed = entry.listener.next_positions()
        message = decode_pb2.DecodeReattach(handle=handle, attempt=attempt, next_positions=needed)
        self._send(decode_pb2.DecodeServiceSessionRequest(reattach=message))
        self._send_aborted(handle, entry)

    def _send_aborted(self, handle: int, entry: _Open) -> None:
        """All of them: what was said before may have been lost, and twice is as good as once."""
        if entry.aborted:
            abort = decode_pb2.DecodeAbortChoices(choices=sorted(entry.aborted))
            message = decode_pb2.DecodeAbortChoicesHandle(handle=handle, abort_choices=abort)
            self._send(decode_pb2.DecodeServiceSessionRequest(abort_choices=message))

    def _last_word(self, handle: int, entry: _Open) -> Any:
        return _abort(handle, entry, "the router gave up on the lost session")

    def _tell_lost(self, entry: _Open, error: KvRelayError) -> None:
        entry.listener.on_decode_lost(error)


def _abort(handle: int, entry: _Open, reason: str) -> decode_pb2.DecodeServiceSessionRequest:
    message = decode_pb2.DecodeAbortHandle(handle=handle, attempt=entry.attempt, reason=reason)
    return decode_pb2.DecodeServiceSessionRequest(abort=message)
