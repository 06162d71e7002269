"""The prefill requests of this worker and what becomes of each: between routers' streams and the engine.

    open -> Queued* -> Accepted{ticket} -> Finished | failed
A record outlives `Finished` while the router's stream is the lease of its ticket (PROTOCOL B2): until a reader has
released it, the router releases or cancels it or is gone, or the lease's own caps have passed.

What a router cancels, it is told no more about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from kvrelay.v1 import prefill_pb2 as pb
from kvrelay.v1.common_pb2 import ErrorDetail
from kvrelay_core.errors import KvRelayError, SupersededError
from kvrelay_core.request import AttemptId, Generation
from kvrelay_core.rpc.status import error_to_detail
from kvrelay_core.rpc.wire import first_token_to_wire, usage_to_wire
from kvrelay_engine import messages
from kvrelay_worker.attempts import AttemptTable
from kvrelay_worker.wire import error_info_to_wire, ticket_to_wire
from kvrelay_worker.worker import Worker


class Receiver(Protocol):
    """Where the events of a request go: a router's session, or the stream of one request."""

    def put(self, handle: int, event: pb.PrefillResponse) -> None: ...


@dataclass(slots=True, eq=False)
class PrefillRequest:
    id: int
    attempt: AttemptId
    receiver: Receiver
    handle: int
    told: list[pb.PrefillResponse] = field(default_factory=list)  # again, to a router that comes back
    is_finished: bool = False
    lease_s: float = 0.0  # how long the ticket can live after Finished
    forget_at_s: float = 0.0  # once finished


class PrefillRequests:
    def __init__(self, worker: Worker, is_followed: Callable[[AttemptId], bool]) -> None:
        self._worker = worker
        self._is_followed = is_followed
        self._attempts: AttemptTable[PrefillRequest] = AttemptTable(worker.clock)
        self._by_id: dict[int, PrefillRequest] = {}
        self._by_handle: dict[tuple[Receiver, int], PrefillRequest] = {}
        worker.count_live(lambda: sum(not request.is_finished for request in self._by_id.values()))
        engine = worker.engine
        engine.on(messages.Queued, self._on_queued)
        engine.on(messages.Accepted, self._on_accepted)
        engine.on(messages.PrefillFinished, self._on_finished)
        engine.on(messages.RequestFailed, lambda event: self._end(event.id, error_info_to_wire(event.error)))
        engine.on(messages.Beat, lambda _: self._forget_expired())
        engine.on_loss(self._on_loss)

    def __len__(self) -> int:
        return len(self._by_id)

    # --------------------------------------------------------------------------------- what routers ask

    def open(
        self, attempt: AttemptId, generation: Generation, handoff: bool, receiver: Receiver, handle: int
    ) -> PrefillRequest:
        """Starts the attempt, or re-attaches to it: then the receiver gets everything told so far again.

        Raises SupersededError, RequestCancelledError, DrainingError, UnavailableError.
        """
        known = self._attempts.find(attempt)
        if known is not None:
            self._by_handle.pop((known.receiver, known.handle), None)
            known.receiver, known.handle = receiver, handle
            self._by_handle[receiver, handle] = known
            for event in known.told:
                receiver.put(handle, event)
            return known
        self._worker.check_accepting()
        request = PrefillRequest(next(self._worker.request_ids), attempt, receiver, handle)
        self._worker.engine.send(messages.Prefill(request.id, attempt, generation, handoff))
        superseded = self._attempts.begin(attempt, request)
        self._by_id[request.id] = request
        self._by_handle[receiver, handle] = request
        if superseded is not None:
            self._supersede(superseded, attempt)
        return request

    def attempt_of(self, receiver: Receiver, handle: int) -> AttemptId | None:
        """What the handle stands for; None when it is not known yet or over."""
        request = self._by_handle.get((receiver, handle))
        return None if request is None else request.attempt

    def cancel(self, attempt: AttemptId) -> None:
        """Aborts the attempt and every lower one; remembers a cancel that came first."""
        request = self._attempts.cancel(attempt)
        if request is not None:
            self._abort(request, "cancelled by the router")

    def release(self, attempt: AttemptId) -> None:
        """The router has no use for the ticket: nobody will follow it."""
        request = self._find(attempt)
        if request is not None:
            self._close_stream(request)

    def released_by_reader(self, attempt: AttemptId) -> None:
        """A reader gave the pins back: the router's stream does not hold them any more."""
        request = self._find(attempt)
        if request is not None and request.is_finished:
            self._forget(request)

    def leave(self, receiver: Receiver) -> None:
        """The stream of a router is gone for good: what no reader follows is freed."""
        for request in [request for request in self._by_id.values() if request.receiver is receiver]:
            self._close_stream(request)

    # ------------------------------------------------------------------------------- what the engine says

    def _on_queued(self, event: messages.Queued) -> None:
        request = self._by_id.get(event.id)
        if request is not None:
            # Not kept: it is out of date when a router comes back.
            request.receiver.put(request.handle, pb.PrefillResponse(queued=pb.PrefillQueued(eta_s=event.eta_s)))

    def _on_accepted(self, event: messages.Accepted) -> None:
        ticket = None if event.ticket is None else ticket_to_wire(event.ticket)
        accepted = pb.PrefillAccepted(ticket=ticket, cached_tokens=event.cached_tokens)
        request = self._tell(event.id, pb.PrefillResponse(accepted=accepted))
        if request is not None and event.ticket is not None:
            request.lease_s = max(event.ticket.lease.first_follow_s, event.ticket.lease.wall_cap_s)

    def _on_finished(self, event: messages.PrefillFinished) -> None:
        finished = pb.PrefillFinished(
            first_tokens=map(first_token_to_wire, event.first_tokens),
            usage=usage_to_wire(event.usage),
            queue_s=event.queue_s,
            compute_s=event.compute_s,
        )
        request = self._tell(event.id, pb.PrefillResponse(finished=finished))
        if request is None:
            return
        request.is_finished = True
        # Without a ticket it is kept for the grace, so that a lost session can still learn the answer.
        keep_s = max(request.lease_s, 2 * self._worker.config.session_grace_s)
        request.forget_at_s = self._worker.clock.now() + keep_s

    def _end(self, request_id: int, detail: ErrorDetail) -> None:
        request = self._tell(request_id, pb.PrefillResponse(failed=detail))
        if request is not None:
            self._forget(request)

    def _tell(self, request_id: int, event: pb.PrefillResponse) -> PrefillRequest | None:
        request = self._by_id.get(request_id)
        if request is not None:
            request.told.append(event)
            request.receiver.put(request.handle, event)
        return request

    # ------------------------------------------------------------------------------------------- endings

    def _supersede(self, request: PrefillRequest, by: AttemptId) -> None:
        error = SupersededError(f"attempt {request.attempt.attempt} was superseded by attempt {by.attempt}")
        request.receiver.put(request.handle, pb.PrefillResponse(failed=error_to_detail(error)))
        self._abort(request, "superseded")

    def _abort(self, request: PrefillRequest, reason: str) -> None:
        self._forget(request)
        self._worker.engine.notify(messages.Abort(request.id, reason))

    def _close_stream(self, request: PrefillRequest) -> None:
        if request.is_finished or self._is_followed(request.attempt):
            self._worker.engine.notify(messages.PrefillStreamClosed(request.id))
            self._forget(request)
        else:
            self._abort(request, "the router's stream is gone")

    def _forget(self, request: PrefillRequest) -> None:
        self._by_id.pop(request.id, None)
        self._by_handle.pop((request.receiver, request.handle), None)
        self._attempts.end(request.attempt)

    def _forget_expired(self) -> None:
        """The lease's caps have ended it in the engine."""
        now_s = self._worker.clock.now()
        for request in [request for request in self._by_id.values() if request.is_finished]:
            if request.forget_at_s <= now_s:
                self._forget(request)

    def _find(self, attempt: AttemptId) -> PrefillRequest | None:
        try:
            return self._attempts.find(attempt)
        except KvRelayError:
            return None  # superseded, cancelled or over: nothing to release

    def _on_loss(self, error: KvRelayError) -> None:
        for request in list(self._by_id.values()):
            if not request.is_finished:
                request.receiver.put(request.handle, pb.PrefillResponse(failed=error_to_detail(error)))
            self._forget(request)
