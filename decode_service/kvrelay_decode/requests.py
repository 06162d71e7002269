"""The decode requests of this worker and what becomes of each: between routers' streams and the engine.

    open{ticket?} -> Accepted -> tokens* -> Finished (each choice)
                  -> HandoffLost -> resume{committed} -> tokens* -> Finished
                  -> handed back | failed
The end of a request is kept for a grace, so that a router whose session was lost just then still learns of it.

What a router aborts, a request or choices of it, it is told no more about.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from kvrelay.v1 import decode_pb2 as pb
from kvrelay_core.error_info import error_of
from kvrelay_core.errors import (
    InvalidRequestError,
    KvRelayError,
    OverloadedError,
    RequestCancelledError,
    SupersededError,
    UnavailableError,
)
from kvrelay_core.request import AttemptId, ChoiceState, Generation, PrefixHint
from kvrelay_core.rpc.status import error_to_detail
from kvrelay_core.rpc.wire import finish_reason_to_wire, handoff_timing_to_wire
from kvrelay_decode.follow import HandoffFollow
from kvrelay_decode.output_log import OutputLog, Row
from kvrelay_decode.step_split import StepColumns, pack
from kvrelay_engine import messages
from kvrelay_engine.messages import ReleaseReason
from kvrelay_transfer.ticket import KvTicket
from kvrelay_worker.attempts import AttemptTable
from kvrelay_worker.peers import PeerBook
from kvrelay_worker.request_trace import KV_TRANSFER, RequestTrace
from kvrelay_worker.wire import error_info_to_wire
from kvrelay_worker.worker import Worker


class Receiver(Protocol):
    """Where tokens and events of requests go: a router's session, or the stream of one request."""

    def put_tokens(self, tokens: pb.StepTokens) -> None: ...

    def put_event(self, handle: int, event: pb.DecodeEvent) -> None: ...

    def end(self, handle: int) -> None:
        """Nothing more comes for this handle."""


@dataclass(slots=True, eq=False)
class DecodeRequest:
    id: int
    attempt: AttemptId
    receiver: Receiver
    handle: int
    pending: set[int]  # choices that go on
    trace: RequestTrace
    follow: HandoffFollow | None = None
    log: OutputLog = field(default_factory=OutputLog)
    accepted: pb.DecodeEvent | None = None
    lost: pb.DecodeEvent | None = None  # the HandoffLost that waits for Resume or Abort
    endings: list[pb.DecodeEvent] = field(default_factory=list)
    aborted: set[int] = field(default_factory=set)  # choices
    is_over: bool = False
    forget_at_s: float = 0.0  # once over


class DecodeRequests:
    def __init__(self, worker: Worker, peers: PeerBook) -> None:
        self._worker = worker
        self._peers = peers
        self._attempts: AttemptTable[DecodeRequest] = AttemptTable(worker.clock)
        self._by_id: dict[int, DecodeRequest] = {}
        self._by_handle: dict[tuple[Receiver, int], DecodeRequest] = {}
        worker.count_live(lambda: sum(not request.is_over for request in self._by_id.values()))
        engine = worker.engine
        engine.on(messages.StepTokens, self._on_step)
        engine.on(messages.HandoffDone, self._on_handoff_done)
        engine.on(messages.HandoffLost, self._on_handoff_lost)
        engine.on(messages.HandoffRelease, self._on_handoff_release)
        engine.on(messages.ChoiceFinished, self._on_choice_finished)
        engine.on(messages.HandedBack, self._on_handed_back)
        engine.on(messages.RequestFailed, self._on_failed)
        engine.on(messages.Beat, self._on_beat)
        engine.on_loss(self.fail_all)

    def __len__(self) -> int:
        return len(self._by_id)

    # --------------------------------------------------------------------------------- what routers ask

    def open(
        self,
        attempt: AttemptId,
        generation: Generation,
        ticket: KvTicket | None,
        receiver: Receiver,
        handle: int,
        hint: PrefixHint | None = None,
        trace_parent: str = "",
    ) -> None:
        """Starts the attempt, or re-attaches to it: then the receiver gets everything again.

        With a ticket, the Follow stream at its source is opened at once, before anything is reserved here.
        """
        known = self._attempts.find(attempt)
        if known is not None:
            self._attach(known, receiver, handle, {})
            return
        self._worker.check_accepting()
        if ticket is not None:
            self._peers.check_allowed(ticket.source_address)
        choices = {choice.index for choice in generation.choices}
        trace = RequestTrace("decode", attempt, trace_parent)
        request = DecodeRequest(next(self._worker.request_ids), attempt, receiver, handle, choices, trace)
        self._worker.engine.send(messages.Decode(request.id, attempt, generation, ticket, hint))
        superseded = self._attempts.begin(attempt, request)
        self._by_id[request.id] = request
        self._by_handle[receiver, handle] = request
        if ticket is not None:
            request.follow = HandoffFollow(self._worker, self._peers, request.id, ticket)
            request.follow.start()
            request.trace.begin(KV_TRANSFER)
        if superseded is not None:
            error = SupersededError(f"attempt {superseded.attempt.attempt} was superseded by {attempt.attempt}")
            self._fail(superseded, error)

    def reattach(self, attempt: AttemptId, receiver: Receiver, handle: int, next_positions: Mapping[int, int]) -> None:
        """Sends everything from these positions on to this receiver, and what follows.

        Raises UnavailableError when the attempt does not run here (any more).
        """
        request = self._attempts.find(attempt)
        if request is None:
            raise UnavailableError(
                f"attempt {attempt.attempt} of {attempt.request_id} is not known here; place it anew"
            )
        self._attach(request, receiver, handle, next_positions)

    def resume(self, receiver: Receiver, handle: int, attempt: AttemptId, choices: tuple[ChoiceState, ...]) -> None:
        """Goes on after a lost hand-off as a higher attempt. A repeated resume has no effect.

        Raises UnavailableError when the handle is not known; fails the request when nothing was lost.
        """
        request = self._by_handle.get((receiver, handle))
        if request is None:
            raise UnavailableError(f"handle {handle} is not known here; place the request anew")
        if request.attempt == attempt:
            return
        if request.lost is None:
            self._fail(request, InvalidRequestError("resume without a lost hand-off"))
            return
        self._attempts.promote(request.attempt, attempt)
        request.attempt = attempt
        request.lost = None
        request.pending = {choice.index for choice in choices} - request.aborted
        if request.pending:
            self._worker.engine.send(messages.Resume(request.id, choices))
        else:
            self._abort(request, "every choice was aborted")

    def trace_of(self, request_id: int) -> RequestTrace | None:
        request = self._by_id.get(request_id)
        return None if request is None else request.trace

    def attempt_of(self, receiver: Receiver, handle: int) -> AttemptId | None:
        """What the handle stands for; None when it is not known yet or over."""
        request = self._by_handle.get((receiver, handle))
        return None if request is None else request.attempt

    def abort(self, attempt: AttemptId, reason: str) -> None:
        """Aborts the attempt and every lower one; remembers an abort that came first."""
        request = self._attempts.cancel(attempt)
        if request is not None:
            self._abort(request, reason)

    def abort_choices(self, receiver: Receiver, handle: int, choices: Iterable[int], reason: str) -> None:
        """Nobody wants these choices; after the last one the request is over. Without effect for what is over."""
        request = self._by_handle.get((receiver, handle))
        if request is None or request.is_over:
            return
        request.aborted.update(choices)
        unwanted = request.pending & request.aborted
        request.pending -= unwanted
        if not request.pending:
            self._abort(request, reason)
        elif unwanted:
            self._worker.engine.notify(messages.Abort(request.id, reason, tuple(sorted(unwanted))))

    def leave(self, receiver: Receiver, reason: str) -> None:
        """The stream is gone for good: its requests are aborted."""
        for request in [request for request in self._by_id.values() if request.receiver is receiver]:
            self._abort(request, reason)

    def fail_all(self, error: KvRelayError) -> None:
        """This worker cannot serve any of them any more, and says why."""
        for request in list(self._by_id.values()):
            self._fail(request, error)

    # ------------------------------------------------------------------------------- what the engine says

    def _on_step(self, step: messages.StepTokens) -> None:
        columns: dict[Receiver, StepColumns] = {}
        logprobs = step.logprobs or (None,) * len(step.ids)
        rows = zip(step.ids, step.choices, step.positions, step.token_ids, logprobs, strict=True)
        for request_id, choice, position, token_id, entry in rows:
            request = self._by_id.get(request_id)
            if request is None or choice not in request.pending:
                continue
            row = Row(choice, position, token_id, entry)
            request.log.append(row)
            packed = columns.get(request.receiver)
            if packed is None:
                packed = columns[request.receiver] = StepColumns()
            packed.add(request.handle, row)
        for receiver, packed in columns.items():
            receiver.put_tokens(packed.to_wire())

    def _on_handoff_done(self, event: messages.HandoffDone) -> None:
        request = self._by_id.get(event.id)
        if request is not None:
            request.trace.finish(KV_TRANSFER, event.timing)
            accepted = pb.DecodeAccepted(handoff=handoff_timing_to_wire(event.timing))
            request.accepted = pb.DecodeEvent(accepted=accepted)
            request.receiver.put_event(request.handle, request.accepted)

    def _on_handoff_lost(self, event: messages.HandoffLost) -> None:
        request = self._by_id.get(event.id)
        if request is None:
            return
        _release(request, ReleaseReason.FAILED)
        request.trace.finish(KV_TRANSFER, error=event.error.reason)
        lost = pb.HandoffLost(
            verified_blocks=event.verified_blocks,
            verified_tokens=event.verified_tokens,
            cause=error_info_to_wire(event.error),
        )
        request.lost = pb.DecodeEvent(handoff_lost=lost)
        request.receiver.put_event(request.handle, request.lost)

    def _on_handoff_release(self, event: messages.HandoffRelease) -> None:
        request = self._by_id.get(event.id)
        if request is not None:
            _release(request, event.reason)

    def _on_choice_finished(self, event: messages.ChoiceFinished) -> None:
        request = self._by_id.get(event.id)
        if request is None or event.choice not in request.pending:
            return
        request.pending.remove(event.choice)
        finished = pb.ChoiceFinished(
            choice=event.choice,
            reason=finish_reason_to_wire(event.reason),
            num_tokens=event.num_tokens,
            stop_token_id=event.stop_token_id,
        )
        self._tell_ending(request, pb.DecodeEvent(finished=finished), is_last=not request.pending)

    def _on_handed_back(self, event: messages.HandedBack) -> None:
        request = self._by_id.get(event.id)
        if request is not None:
            back = pb.HandoffLost(cause=error_info_to_wire(event.error))
            self._tell_ending(request, pb.DecodeEvent(handed_back=back), is_last=True)

    def _on_failed(self, event: messages.RequestFailed) -> None:
        request = self._by_id.get(event.id)
        if request is None:
            return
        reason = _reason_for(error_of(event.error))
        _release(request, reason)
        self._tell_ending(request, pb.DecodeEvent(failed=error_info_to_wire(event.error)), is_last=True)
        if reason is ReleaseReason.REFUSED and request.accepted is None and not request.log.has_rows:
            # The router offers it again, here too: that must be a new try, not the old answer.
            self._forget(request)
            self._attempts.refuse(request.attempt)

    def _on_beat(self, beat: messages.Beat) -> None:
        now_s = self._worker.clock.now()
        for request in list(self._by_id.values()):
            if request.is_over and request.forget_at_s <= now_s:
                self._forget(request)
            elif request.follow is not None:
                request.follow.beat(beat.pulled.get(request.id, 0))

    # ------------------------------------------------------------------------------------------- internal

    def _attach(
        self, request: DecodeRequest, receiver: Receiver, handle: int, next_positions: Mapping[int, int]
    ) -> None:
        self._by_handle.pop((request.receiver, request.handle), None)
        request.receiver, request.handle = receiver, handle
        self._by_handle[receiver, handle] = request
        try:
            replay = list(request.log.rows_from(next_positions))
        except OverloadedError as error:
            self._fail(request, error)
            return
        if request.accepted is not None:
            receiver.put_event(handle, request.accepted)
        for tokens in pack(handle, replay):
            receiver.put_tokens(tokens)
        if request.lost is not None:
            receiver.put_event(handle, request.lost)
        for event in request.endings:
            receiver.put_event(handle, event)
        if request.is_over:
            receiver.end(handle)

    def _tell_ending(self, request: DecodeRequest, event: pb.DecodeEvent, *, is_last: bool) -> None:
        request.endings.append(event)
        request.receiver.put_event(request.handle, event)
        if is_last:
            request.trace.end(event.failed.reason)
            _release(request, ReleaseReason.CANCELLED)  # normally the engine did, when it had pulled everything
            request.is_over = True
            request.forget_at_s = self._worker.clock.now() + 2 * self._worker.config.session_grace_s
            request.receiver.end(request.handle)

    def _fail(self, request: DecodeRequest, error: KvRelayError) -> None:
        """Ends the request on the service's own account."""
        request.trace.end(error.reason)
        if not request.is_over:
            request.receiver.put_event(request.handle, pb.DecodeEvent(failed=error_to_detail(error)))
            request.receiver.end(request.handle)
        _release(request, _reason_for(error))
        self._abort(request, error.reason)

    def _abort(self, request: DecodeRequest, reason: str) -> None:
        """Nobody wants it any more."""
        _release(request, ReleaseReason.CANCELLED)
        if not request.is_over:
            self._worker.engine.notify(messages.Abort(request.id, reason))
        self._forget(request)

    def _forget(self, request: DecodeRequest) -> None:
        request.trace.end("RequestCancelledError")  # unless it has ended before
        self._by_id.pop(request.id, None)
        self._by_handle.pop((request.receiver, request.handle), None)
        self._attempts.end(request.attempt)


def _release(request: DecodeRequest, reason: ReleaseReason) -> None:
    if request.follow is not None:
        request.follow.release(reason)
        request.follow = None


def _reason_for(error: KvRelayError) -> ReleaseReason:
    """Where only this worker cannot read the ticket, the router offers it to another one (PROTOCOL B6): it must
    not be freed."""
    match error:
        case OverloadedError() | UnavailableError():
            return ReleaseReason.REFUSED
        case SupersededError() | RequestCancelledError():
            return ReleaseReason.CANCELLED
        case _:
            return ReleaseReason.FAILED
