"""PrefillService: routers' sessions and single requests, turned into calls of `PrefillRequests`."""

from __future__ import annotations

from collections.abc import AsyncIterator

from kvrelay.v1 import prefill_pb2 as pb
from kvrelay.v1 import prefill_pb2_grpc
from kvrelay_core.errors import InvalidRequestError, KvRelayError, SupersededError
from kvrelay_core.request import AttemptId
from kvrelay_core.rpc.status import error_to_detail
from kvrelay_core.rpc.wire import attempt_from_wire, generation_from_wire, prefix_hint_from_wire
from kvrelay_prefill.embedding_sources import EmbeddingSources
from kvrelay_prefill.requests import PrefillRequests
from kvrelay_transfer.ticket import EmbeddingTicket
from kvrelay_worker.embedding_wire import embedding_ticket_from_wire
from kvrelay_worker.outbox import Outbox
from kvrelay_worker.sessions import Session, SessionBook
from kvrelay_worker.stream_end import Context, at_stream_end, guard_stream, until_stream_end
from kvrelay_worker.worker import Worker

SESSION_LIMIT = 4096  # messages that a router may be behind
STREAM_LIMIT = 64

Requests = AsyncIterator[pb.PrefillServiceSessionRequest]
PrefillSession = Session[pb.PrefillServiceSessionResponse]


class _SessionReceiver:
    """A router's session as the receiver of its requests' events."""

    def __init__(self, session: PrefillSession) -> None:
        self.session = session

    def put(self, handle: int, event: pb.PrefillResponse) -> None:
        self.session.outbox.put(pb.PrefillServiceSessionResponse(handle=handle, event=event))


class _StreamReceiver:
    """The stream of one request: it ends with the request."""

    def __init__(self) -> None:
        self.outbox: Outbox[pb.PrefillResponse] = Outbox(STREAM_LIMIT)
        self.is_over = False

    def put(self, handle: int, event: pb.PrefillResponse) -> None:
        self.outbox.put(event)
        if event.WhichOneof("event") in ("finished", "failed"):
            self.is_over = True
            self.outbox.close()


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    def __init__(self, worker: Worker, requests: PrefillRequests, encoders: EmbeddingSources) -> None:
        self._worker = worker
        self._requests = requests
        self._encoders = encoders
        self._receivers: dict[PrefillSession, _SessionReceiver] = {}
        self._sessions: SessionBook[pb.PrefillServiceSessionResponse] = SessionBook(
            worker, self._on_gone, SESSION_LIMIT
        )

    # ------------------------------------------------------------------------------------------- sessions

    async def Session(
        self, request_iterator: Requests, context: Context
    ) -> AsyncIterator[pb.PrefillServiceSessionResponse]:
        session = await self._sessions.open(request_iterator)
        receiver = self._receivers[session] = _SessionReceiver(session)
        session.outbox.put(pb.PrefillServiceSessionResponse(welcome=self._sessions.welcome()))
        reading = guard_stream(session.outbox, self._read, receiver, request_iterator)
        reader = self._worker.tasks.spawn(reading, "session reader")

        def end() -> None:
            reader.cancel()
            self._sessions.lose(session)

        at_stream_end(context, end)
        async for response in session.outbox:
            yield response

    async def _read(self, receiver: _SessionReceiver, requests: Requests) -> None:
        """Never waits for anything but the next message."""
        async for request in until_stream_end(requests):
            match request.WhichOneof("message"):
                case "open":
                    self._open(receiver, request.open)
                case "cancel":
                    attempt = self._attempt_of(receiver, request.cancel)
                    if attempt is not None:
                        self._requests.cancel(attempt)
                case "release":
                    attempt = self._attempt_of(receiver, request.release)
                    if attempt is not None:
                        self._requests.release(attempt)
                case kind:
                    error = InvalidRequestError(f"unexpected message {kind} on a Session; is the router newer?")
                    receiver.session.outbox.fail(error)
                    return
        receiver.session.outbox.close()

    def _open(self, receiver: _SessionReceiver, message: pb.PrefillOpen) -> None:
        try:
            if self._requests.attempt_of(receiver, message.handle) not in (None, _attempt_or_none(message)):
                raise SupersededError(f"handle {message.handle} is in use for another request; choose a new one")
            self._start(message.request, receiver, message.handle)
        except KvRelayError as error:
            receiver.put(message.handle, pb.PrefillResponse(failed=error_to_detail(error)))

    def _attempt_of(self, receiver: _SessionReceiver, message: pb.HandleCancel) -> AttemptId | None:
        """By handle, or by name where the message overtakes its request or the router came back."""
        attempt = self._requests.attempt_of(receiver, message.handle)
        if attempt is None and message.attempt.request_id:
            return attempt_from_wire(message.attempt)
        return attempt

    def _on_gone(self, session: PrefillSession) -> None:
        self._requests.leave(self._receivers.pop(session))

    def end_all(self, error: KvRelayError) -> None:
        """Ends every session, with the error."""
        self._sessions.end_all(error)

    # -------------------------------------------------------------------------------------- single requests

    async def Prefill(self, request: pb.PrefillRequest, context: Context) -> AsyncIterator[pb.PrefillResponse]:
        """A stream that the client ends early cancels its request."""
        receiver = _StreamReceiver()
        self._start(request, receiver, handle=0)
        self._worker.streams.enter()

        def end() -> None:
            self._worker.streams.leave()
            if not receiver.is_over:
                self._requests.leave(receiver)

        at_stream_end(context, end)
        async for response in receiver.outbox:
            yield response

    def _start(self, message: pb.PrefillRequest, receiver: _SessionReceiver | _StreamReceiver, handle: int) -> None:
        attempt = attempt_from_wire(message.attempt)
        generation = generation_from_wire(message.generation)
        hint = prefix_hint_from_wire(message.hint) if message.HasField("hint") else None
        tickets = [
            embedding_ticket_from_wire(item.ticket) for item in message.generation.media if item.HasField("ticket")
        ]
        request = self._requests.open(
            attempt, generation, message.handoff, receiver, handle, hint, message.trace_parent, _each_once(tickets)
        )
        if tickets:
            self._encoders.connect(request.id, tickets)


def _each_once(tickets: list[EmbeddingTicket]) -> tuple[EmbeddingTicket, ...]:
    """Several runs of one image may bring the same ticket."""
    return tuple({ticket.ticket_id: ticket for ticket in tickets}.values())


def _attempt_or_none(message: pb.PrefillOpen) -> AttemptId | None:
    wire = message.request.attempt
    return attempt_from_wire(wire) if wire.request_id else None
