"""DecodeService: routers' sessions and single requests, turned into calls of `DecodeRequests`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from kvrelay.v1 import decode_pb2 as pb
from kvrelay.v1 import decode_pb2_grpc
from kvrelay_core.errors import DeadlineError, InvalidRequestError, KvRelayError, SupersededError
from kvrelay_core.request import AttemptId
from kvrelay_core.rpc.status import error_to_detail
from kvrelay_core.rpc.wire import attempt_from_wire, choice_state_from_wire, generation_from_wire, prefix_hint_from_wire
from kvrelay_decode.requests import DecodeRequests, Receiver
from kvrelay_worker.outbox import Outbox
from kvrelay_worker.sessions import Session, SessionBook
from kvrelay_worker.stream_end import Context, at_stream_end, guard_stream, until_stream_end
from kvrelay_worker.wire import ticket_from_wire
from kvrelay_worker.worker import Worker

SESSION_LIMIT = 4096  # messages that a router may be behind
STREAM_LIMIT = 1024  # messages that the client of one request may be behind

SessionRequests = AsyncIterator[pb.DecodeServiceSessionRequest]
DecodeSession = Session[pb.DecodeServiceSessionResponse]


class _SessionReceiver:
    """A router's session as the receiver of its requests' tokens and events."""

    def __init__(self, session: DecodeSession) -> None:
        self.session = session

    def put_tokens(self, tokens: pb.StepTokens) -> None:
        self.session.outbox.put(pb.DecodeServiceSessionResponse(tokens=tokens))

    def put_event(self, handle: int, event: pb.DecodeEvent) -> None:
        message = pb.DecodeHandleEvent(handle=handle, event=event)
        self.session.outbox.put(pb.DecodeServiceSessionResponse(event=message))

    def end(self, handle: int) -> None:
        """The session goes on."""


class _StreamReceiver:
    """The stream of one request, handle 0: it ends with the request."""

    def __init__(self, requests: DecodeRequests) -> None:
        self.outbox: Outbox[pb.DecodeResponse] = Outbox(
            STREAM_LIMIT, on_overflow=lambda: requests.leave(self, "the client is too far behind")
        )

    def put_tokens(self, tokens: pb.StepTokens) -> None:
        self.outbox.put(pb.DecodeResponse(tokens=tokens))

    def put_event(self, handle: int, event: pb.DecodeEvent) -> None:
        self.outbox.put(pb.DecodeResponse(event=event))

    def end(self, handle: int) -> None:
        self.outbox.close()


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    def __init__(self, worker: Worker, requests: DecodeRequests) -> None:
        self._worker = worker
        self._requests = requests
        self._receivers: dict[DecodeSession, _SessionReceiver] = {}
        self._sessions: SessionBook[pb.DecodeServiceSessionResponse] = SessionBook(worker, self._on_gone, SESSION_LIMIT)

    # ------------------------------------------------------------------------------------------- sessions

    async def Session(
        self, request_iterator: SessionRequests, context: Context
    ) -> AsyncIterator[pb.DecodeServiceSessionResponse]:
        session = await self._sessions.open(request_iterator)
        receiver = self._receivers[session] = _SessionReceiver(session)
        session.outbox.put(pb.DecodeServiceSessionResponse(welcome=self._sessions.welcome()))
        reading = guard_stream(session.outbox, self._read, receiver, request_iterator)
        reader = self._worker.tasks.spawn(reading, "session reader")

        def end() -> None:
            reader.cancel()
            self._sessions.lose(session)

        at_stream_end(context, end)
        async for response in session.outbox:
            yield response

    async def _read(self, receiver: _SessionReceiver, requests: SessionRequests) -> None:
        """Never waits for anything but the next message."""
        async for request in until_stream_end(requests):
            kind = request.WhichOneof("message")
            if kind not in ("open", "resume", "abort", "abort_choices", "reattach"):
                error = InvalidRequestError(f"unexpected message {kind} on a Session; is the router newer?")
                receiver.session.outbox.fail(error)
                return
            try:
                self._take(receiver, request)
            except KvRelayError as error:
                handle = getattr(request, kind).handle
                receiver.put_event(handle, pb.DecodeEvent(failed=error_to_detail(error)))
        receiver.session.outbox.close()

    def _take(self, receiver: _SessionReceiver, request: pb.DecodeServiceSessionRequest) -> None:
        match request.WhichOneof("message"):
            case "open":
                self._open(request.open.start, receiver, request.open.handle)
            case "resume":
                self._resume(request.resume.resume, receiver, request.resume.handle)
            case "abort":
                attempt = self._requests.attempt_of(receiver, request.abort.handle)
                if attempt is None and request.abort.attempt.request_id:
                    attempt = attempt_from_wire(request.abort.attempt)
                if attempt is not None:
                    self._requests.abort(attempt, request.abort.reason or "aborted by the router")
            case "abort_choices":
                choices = request.abort_choices.abort_choices.choices
                self._requests.abort_choices(receiver, request.abort_choices.handle, choices, "aborted by the router")
            case "reattach":
                message = request.reattach
                attempt = attempt_from_wire(message.attempt)
                self._requests.reattach(attempt, receiver, message.handle, message.next_positions)

    def _on_gone(self, session: DecodeSession) -> None:
        self._requests.leave(self._receivers.pop(session), "the router's session is gone")

    def end_all(self, error: KvRelayError) -> None:
        """Ends every session, with the error."""
        self._sessions.end_all(error)

    # -------------------------------------------------------------------------------------- single requests

    async def Decode(
        self, request_iterator: AsyncIterator[pb.DecodeRequest], context: Context
    ) -> AsyncIterator[pb.DecodeResponse]:
        """A client may half-close after its last message; one that goes away aborts its request."""
        start = await self._read_start(request_iterator)
        receiver = _StreamReceiver(self._requests)
        self._open(start, receiver, handle=0)
        self._worker.streams.enter()
        reading = guard_stream(receiver.outbox, self._read_stream, receiver, request_iterator)
        reader = self._worker.request_tasks.spawn(reading, "decode reader")

        def end() -> None:
            reader.cancel()
            self._worker.streams.leave()
            self._requests.leave(receiver, "the client is gone")

        at_stream_end(context, end)
        async for response in receiver.outbox:
            yield response

    async def _read_start(self, requests: AsyncIterator[pb.DecodeRequest]) -> pb.DecodeStart:
        try:
            async with asyncio.timeout(self._worker.config.call_timeout_s):
                first = await anext(requests, None)
        except TimeoutError as error:
            raise DeadlineError("no `start` came on the Decode stream") from error
        if first is None or first.WhichOneof("message") != "start":
            raise InvalidRequestError("the first message of a Decode stream must be `start`")
        return first.start

    async def _read_stream(self, receiver: _StreamReceiver, requests: AsyncIterator[pb.DecodeRequest]) -> None:
        async for request in until_stream_end(requests):
            try:
                match request.WhichOneof("message"):
                    case "resume":
                        self._resume(request.resume, receiver, handle=0)
                    case "abort":
                        self._requests.leave(receiver, request.abort.reason or "aborted by the client")
                        receiver.outbox.close()
                    case "abort_choices":
                        choices = request.abort_choices.choices
                        self._requests.abort_choices(receiver, 0, choices, "aborted by the client")
                    case _:
                        raise InvalidRequestError("after `start` only `resume`, `abort` and `abort_choices` may follow")
            except KvRelayError as error:
                receiver.outbox.fail(error)

    # ------------------------------------------------------------------------------------------- internal

    def _open(self, start: pb.DecodeStart, receiver: Receiver, handle: int) -> None:
        attempt = attempt_from_wire(start.attempt)
        if self._requests.attempt_of(receiver, handle) not in (None, attempt):
            raise SupersededError(f"handle {handle} is in use for another request; choose a new one")
        ticket = ticket_from_wire(start.ticket) if start.HasField("ticket") else None
        hint = prefix_hint_from_wire(start.hint) if start.HasField("hint") else None
        generation = generation_from_wire(start.generation)
        self._requests.open(attempt, generation, ticket, receiver, handle, hint, start.trace_parent)

    def _resume(self, resume: pb.DecodeResume, receiver: Receiver, handle: int) -> None:
        attempt: AttemptId = attempt_from_wire(resume.attempt)
        self._requests.resume(receiver, handle, attempt, tuple(map(choice_state_from_wire, resume.choices)))
