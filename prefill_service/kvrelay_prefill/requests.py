"""The prefill requests of this worker and what becomes of each: between routers' streams and the engine.

    open -> Queued* -> Accepted{ticket} -> Finished | failed
A record outlives `Finished` while the lease of its ticket lives (PROTOCOL B2), unless the router releases or cancels
it or is gone; and for the grace, so that a router whose session was lost just then is told again. A request that has
lost its router goes on computing for the reader that follows it, and no longer.

What a router cancels, it is told no more about.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from kvrelay.v1 import prefill_pb2 as pb
from kvrelay.v1.common_pb2 import ErrorDetail
from kvrelay_core.errors import KvRelayError, SupersededError
from kvrelay_core.request import AttemptId, Generation, PrefixHint
from kvrelay_core.rpc.status import error_to_detail
from kvrelay_core.rpc.wire import first_token_to_wire, usage_to_wire
from kvrelay_engine import messages
from kvrelay_prefill.lease_watch import LeaseWatch
from kvrelay_transfer.ticket import EmbeddingTicket
from kvrelay_worker.attempts import AttemptTable
from kvrelay_worker.follows import FollowEnd
from kvrelay_worker.request_trace import RequestTrace
from kvrelay_worker.wire import error_info_to_wire, ticket_to_wire
from kvrelay_worker.worker import Worker


class Receiver(Protocol):
    """Where the events of a request go: a router's session, or the stream of one request."""

    def put(self, handle: int, event: pb.PrefillResponse) -> None: ...


@dataclass(slots=True, eq=False)
class PrefillRequest:
    id: int
    attempt: AttemptId
    receiver: Receiver | None  # None: the router is gone for good, or has no use for it
    handle: int
    lease: LeaseWatch
    trace: RequestTrace
    told: list[pb.PrefillResponse] = field(default_factory=list)  # again, to a router that comes back
    is_finished: bool = False
    replay_until_s: float = 0.0  # once finished

    def put(self, event: pb.PrefillResponse) -> None:
        if self.receiver is not None:
            self.receiver.put(self.handle, event)


class PrefillRequests:
    """Is a `FollowObserver` of its tickets."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._attempts: AttemptTable[PrefillRequest] = AttemptTable(worker.clock)
        self._by_id: dict[int, PrefillRequest] = {}
        self._by_handle: dict[tuple[Receiver, int], PrefillRequest] = {}
        worker.count_live(lambda: sum(not request.is_finished for request in self._by_id.values()))
        engine = worker.engine
        engine.on(messages.Queued, self._on_queued)
        engine.on(messages.Accepted, self._on_accepted)
        engine.on(messages.PrefillFinished, self._on_finished)
        engine.on(messages.RequestFailed, lambda event: self._end(event.id, error_info_to_wire(event.error)))
        engine.on(messages.Beat, lambda _: self._settle_all())
        engine.on_loss(self.fail_all)

    def __len__(self) -> int:
        return len(self._by_id)

    # --------------------------------------------------------------------------------- what routers ask

    def open(
        self,
        attempt: AttemptId,
        generation: Generation,
        handoff: bool,
        receiver: Receiver,
        handle: int,
        hint: PrefixHint | None = None,
        trace_parent: str = "",
        embeddings: tuple[EmbeddingTicket, ...] = (),
    ) -> PrefillRequest:
        """Starts the attempt, or re-attaches to it: then the receiver gets everything told so far again.

        Raises SupersededError, RequestCancelledError, DrainingError, UnavailableError.
        """
        known = self._attempts.find(attempt)
        if known is not None:
            self._detach(known)
            known.receiver, known.handle = receiver, handle
            self._by_handle[receiver, handle] = known
            for event in known.told:
                receiver.put(handle, event)
            return known
        self._worker.check_accepting()
        lease = LeaseWatch(self._worker.clock)
        trace = RequestTrace("prefill", attempt, trace_parent)
        request = PrefillRequest(next(self._worker.request_ids), attempt, receiver, handle, lease, trace)
        self._worker.engine.send(messages.Prefill(request.id, attempt, generation, handoff, hint, embeddings))
        superseded = self._attempts.begin(attempt, request)
        self._by_id[request.id] = request
        self._by_handle[receiver, handle] = request
        if superseded is not None:
            self._supersede(superseded, attempt)
        return request

    def trace_of(self, request_id: int) -> RequestTrace | None:
        request = self._by_id.get(request_id)
        return None if request is None else request.trace

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

    def leave(self, receiver: Receiver) -> None:
        """The stream of a router is gone for good: what no reader follows is freed."""
        for request in [request for request in self._by_id.values() if request.receiver is receiver]:
            self._close_stream(request)

    def fail_all(self, error: KvRelayError) -> None:
        """This worker cannot serve any of them any more, and says why."""
        for request in list(self._by_id.values()):
            if not request.is_finished:
                request.put(pb.PrefillResponse(failed=error_to_detail(error)))
            self._abort(request, error.reason)

    # ---------------------------------------------------------------------------------- what readers do

    def on_followed(self, attempt: AttemptId) -> None:
        request = self._find(attempt)
        if request is not None:
            request.lease.followed()

    def on_unfollowed(self, attempt: AttemptId, end: FollowEnd) -> None:
        request = self._find(attempt)
        if request is None:
            return
        match end:
            case FollowEnd.LOST:
                request.lease.lost()
            case FollowEnd.REFUSED if request.receiver is not None:
                request.lease.refused()
            case _:
                request.lease.ended()
        self._settle(request)

    # ------------------------------------------------------------------------------- what the engine says

    def _on_queued(self, event: messages.Queued) -> None:
        request = self._by_id.get(event.id)
        if request is not None:
            # Not kept: it is out of date when a router comes back.
            request.put(pb.PrefillResponse(queued=pb.PrefillQueued(eta_s=event.eta_s)))

    def _on_accepted(self, event: messages.Accepted) -> None:
        ticket = None if event.ticket is None else ticket_to_wire(event.ticket)
        accepted = pb.PrefillAccepted(ticket=ticket, cached_tokens=event.cached_tokens)
        request = self._tell(event.id, pb.PrefillResponse(accepted=accepted))
        if request is not None and event.ticket is not None:
            request.lease.granted(event.ticket.lease)

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
        request.trace.note(
            prompt_tokens=event.usage.prompt_tokens,
            cached_tokens=event.usage.cached_tokens,
            queue_s=event.queue_s,
            compute_s=event.compute_s,
        )
        request.trace.end()
        request.is_finished = True
        request.replay_until_s = self._worker.clock.now() + 2 * self._worker.config.session_grace_s
        if request.receiver is None:
            self._forget(request)  # the Follow holds the ticket by itself

    def _end(self, request_id: int, detail: ErrorDetail) -> None:
        request = self._tell(request_id, pb.PrefillResponse(failed=detail))
        if request is not None:
            request.trace.end(detail.reason)
            self._forget(request)

    def _tell(self, request_id: int, event: pb.PrefillResponse) -> PrefillRequest | None:
        request = self._by_id.get(request_id)
        if request is not None:
            request.told.append(event)
            request.put(event)
        return request

    # ------------------------------------------------------------------------------------------- endings

    def _supersede(self, request: PrefillRequest, by: AttemptId) -> None:
        error = SupersededError(f"attempt {request.attempt.attempt} was superseded by attempt {by.attempt}")
        request.put(pb.PrefillResponse(failed=error_to_detail(error)))
        self._abort(request, "superseded")

    def _abort(self, request: PrefillRequest, reason: str) -> None:
        self._forget(request)
        self._worker.engine.notify(messages.Abort(request.id, reason))

    def _close_stream(self, request: PrefillRequest) -> None:
        """The router's stream does not hold the ticket any more."""
        self._worker.engine.notify(messages.PrefillStreamClosed(request.id))
        if request.is_finished:
            self._forget(request)
            return
        self._detach(request)
        request.receiver = None
        self._settle(request)

    def _settle(self, request: PrefillRequest) -> None:
        """Ends what nobody has a use for any more."""
        if not request.is_finished:
            if request.receiver is None and not request.lease.has_reader:
                self._abort(request, "its router is gone and no reader follows it")
        elif request.lease.is_over and request.replay_until_s <= self._worker.clock.now():
            self._forget(request)

    def _settle_all(self) -> None:
        """What ends by its time ends at one of the engine's beats."""
        for request in list(self._by_id.values()):
            self._settle(request)

    def _detach(self, request: PrefillRequest) -> None:
        if request.receiver is not None:
            self._by_handle.pop((request.receiver, request.handle), None)

    def _forget(self, request: PrefillRequest) -> None:
        request.trace.end("RequestCancelledError")  # unless it has ended before
        self._by_id.pop(request.id, None)
        self._detach(request)
        self._attempts.end(request.attempt)

    def _find(self, attempt: AttemptId) -> PrefillRequest | None:
        try:
            return self._attempts.find(attempt)
        except KvRelayError:
            return None  # superseded, cancelled or over
