"""One leg's connection to its two workers: session handles out, worker messages in as events of the current attempt.

Also holds what the leg is charged with in the account of loads. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kvrelay.v1 import common_pb2, decode_pb2, prefill_pb2
from kvrelay_core.errors import DrainingError, KvRelayError, UnavailableError
from kvrelay_core.request import FinishReason, Generation
from kvrelay_core.rpc import wire
from kvrelay_core.rpc.status import error_from_detail
from kvrelay_router import itinerary_messages as m
from kvrelay_router.committer import Ending, Token
from kvrelay_router.decode_session import DecodeSession
from kvrelay_router.encode_link import EncodeLink
from kvrelay_router.encode_messages import CancelEncode, Encode, ReleaseEmbeddings
from kvrelay_router.fleet import Fleet
from kvrelay_router.placement import RequestView
from kvrelay_router.placement_wait import PlacementWait, WaitTerms
from kvrelay_router.prefill_session import PrefillSession

if TYPE_CHECKING:
    from kvrelay_router.request_run import RequestRun


class PrefillLink:
    """One open request at a prefill worker."""

    def __init__(
        self,
        run: RequestRun,
        session: PrefillSession,
        action: m.OpenPrefill,
        on_accepted: Callable[[common_pb2.KvTicket | None], None],
        on_finished: Callable[[], None],
    ) -> None:
        self._run, self.session, self._leg, self._attempt = run, session, action.leg, action.attempt
        self._on_accepted, self._on_finished = on_accepted, on_finished
        self.handle = 0
        self.is_finished = False
        self.is_handed_over = not action.handoff

    def close_if_done(self) -> None:
        """Once the worker has no more to say or to keep, a lost session need not bring it back."""
        if self.is_finished and self.is_handed_over:
            self.session.forget(self.handle)

    def on_prefill(self, event: prefill_pb2.PrefillResponse) -> None:
        match event.WhichOneof("event"):
            case "accepted":
                ticket = event.accepted.ticket if event.accepted.HasField("ticket") else None
                self._on_accepted(ticket)
                self._run.feed(m.PrefillAccepted(self._leg, self._attempt, ticket))
            case "finished":
                self.is_finished = True
                self.close_if_done()
                self._on_finished()
                self._run.note_prefill_finished(event.finished)
                tokens = tuple(map(wire.first_token_from_wire, event.finished.first_tokens))
                self._run.feed(m.PrefillFinished(self._leg, self._attempt, tokens))
            case "failed":
                error = error_from_detail(event.failed)
                if isinstance(error, DrainingError):
                    self.session.note_draining()
                self._run.feed(m.PrefillFailed(self._leg, self._attempt, error))
            case _:
                pass  # queued: an estimate

    def on_prefill_lost(self, error: KvRelayError) -> None:
        self._run.feed(m.PrefillLost(self._leg, self._attempt, error))


class DecodeLink:
    """One open request at a decode worker; a resume gives it a higher attempt."""

    def __init__(
        self, run: RequestRun, session: DecodeSession, action: m.OpenDecode, on_accepted: Callable[[], None]
    ) -> None:
        self._run, self.session, self._leg, self.attempt = run, session, action.leg, action.attempt
        self._choices = tuple(choice.index for choice in action.generation.choices)
        self._on_accepted = on_accepted
        self.handle = 0
        self._has_kv = False  # of all tokens of the choices but the last

    def note_kv(self, fleet: Fleet) -> None:
        """Remembers what the worker holds of the request, for the next turn or for whoever goes on with it."""
        if self._has_kv:
            for choice in self._choices:
                fleet.note_kv(self.session.key, self._run.generation, self._run.tokens(choice)[:-1])

    def on_token(self, choice: int, position: int, token_id: int, logprobs: common_pb2.TokenLogprobs | None) -> None:
        wanted = logprobs is not None and self._run.wants_logprobs
        self._has_kv = True
        entry = wire.logprobs_from_wire(logprobs) if wanted and logprobs is not None else None
        self._run.feed(m.DecodeTokens(self._leg, self.attempt, (Token(choice, position, token_id, entry),)))

    def on_decode(self, event: decode_pb2.DecodeEvent) -> None:
        match event.WhichOneof("event"):
            case "accepted":
                self._on_accepted()
                self._run.note_handoff(event.accepted)
                self._run.feed(m.HandoffDone(self._leg, self.attempt))
            case "finished":
                self._run.feed(m.DecodeEnding(self._leg, self.attempt, _ending(event.finished)))
            case "handoff_lost":
                error = error_from_detail(event.handoff_lost.cause)
                verified_tokens = event.handoff_lost.verified_tokens
                self._run.feed(m.HandoffLost(self._leg, self.attempt, error, verified_tokens))
            case "handed_back":
                self._run.feed(m.HandedBack(self._leg, self.attempt, error_from_detail(event.handed_back.cause)))
            case "failed":
                error = error_from_detail(event.failed)
                if isinstance(error, DrainingError):
                    self.session.note_draining()
                self._run.feed(m.DecodeFailed(self._leg, self.attempt, error))
            case _:
                pass  # of a later release

    def on_decode_lost(self, error: KvRelayError) -> None:
        self._run.feed(m.DecodeLost(self._leg, self.attempt, error))

    def next_positions(self) -> Mapping[int, int]:
        return {choice: self._run.next_position(choice) for choice in self._choices}


class LegLink:
    def __init__(self, run: RequestRun, fleet: Fleet, wait_terms: WaitTerms) -> None:
        self._run, self._fleet = run, fleet
        self.placement = PlacementWait(fleet, wait_terms, run.do_guarded)
        self._encodes = EncodeLink(run, fleet, wait_terms)
        self._prefill: PrefillLink | None = None
        self._decode: DecodeLink | None = None
        self._charges: dict[str, tuple[str, int]] = {}  # role -> (worker, tokens)

    def charge(self, route: m.Route, view: RequestView, *, has_ticket: bool) -> None:
        """With a ticket, prefill has been charged already."""
        if route.prefill is not None and not has_ticket:
            self._charge("prefill", route.prefill, view.num_input_tokens)
        self._charge("decode", route.decode, view.num_total_tokens)

    def _charge(self, role: str, worker: str, num_tokens: int) -> None:
        self._discharge(role)
        self._charges[role] = (worker, num_tokens)
        self._fleet.loads.charge(worker, num_tokens)

    def _discharge(self, role: str) -> None:
        if (charge := self._charges.pop(role, None)) is not None:
            self._fleet.loads.discharge(*charge)

    def _prefill_accepted(self, ticket: common_pb2.KvTicket | None) -> None:
        self.placement.accepted()
        if ticket is not None and ticket.lease.first_follow_s > 0:
            self.placement.ticket_s = ticket.lease.first_follow_s

    def _prefill_finished(self) -> None:
        self._discharge("prefill")

    def _decode_accepted(self) -> None:
        self.placement.accepted()
        if self._prefill is not None:
            self._prefill.is_handed_over = True
            self._prefill.close_if_done()

    def do(self, action: m.LegAction) -> None:
        match action:
            case Encode():
                self._encodes.encode(action)
            case CancelEncode():
                self._encodes.cancel()
            case ReleaseEmbeddings(tickets=tickets):
                self._encodes.release(tickets)
            case m.OpenPrefill():
                self._open_prefill(action)
            case m.OpenDecode():
                self._open_decode(action)
            case m.ResumeDecode():
                self._resume_decode(action)
            case m.CancelPrefill() if self._prefill is not None:
                self._prefill.session.cancel(self._prefill.handle)
            case m.ReleaseTicket() if self._prefill is not None:
                self._prefill.session.release(self._prefill.handle)
            case m.AbortDecode(reason=reason) if self._decode is not None:
                self._decode.session.abort(self._decode.handle, reason)
            case m.AbortChoices(choices=choices) if self._decode is not None:
                self._decode.session.abort_choices(self._decode.handle, choices)

    def close(self) -> None:
        """Forgets the handles, with which the workers are through, and what they were charged."""
        self.placement.cancel()
        self._encodes.cancel()
        self._discharge("prefill")
        self._discharge("decode")
        self._forget_handles()

    def abandon(self) -> None:
        """Tells both workers to stop, whatever state they are in; for a run that broke."""
        if self._prefill is not None:
            self._prefill.session.cancel(self._prefill.handle)
        if self._decode is not None:
            self._decode.session.abort(self._decode.handle, "the router gave the request up")
        self.close()

    def _forget_handles(self) -> None:
        if self._prefill is not None:
            self._prefill.session.forget(self._prefill.handle)
        if self._decode is not None:
            self._decode.session.forget(self._decode.handle)
            self._decode.note_kv(self._fleet)
        self._prefill = self._decode = None

    def _open_prefill(self, action: m.OpenPrefill) -> None:
        self._forget_handles()  # of an earlier attempt
        session = self._fleet.registry.prefill[action.worker]
        link = PrefillLink(self._run, session, action, self._prefill_accepted, self._prefill_finished)
        generation = wire.generation_to_wire(self._run.with_time_left(action.generation))
        tickets = {ticket.content_hash: ticket for ticket in action.embeddings}
        for reference in generation.media:
            reference.ticket.CopyFrom(tickets[reference.content_hash])
        request = prefill_pb2.PrefillRequest(
            attempt=wire.attempt_to_wire(self._run.attempt_id(action.leg, action.attempt)),
            generation=generation,
            handoff=action.handoff,
            hint=self._hint(action.worker, action.generation),
            trace_parent=self._run.trace_parent,
        )
        try:
            link.handle = session.open(request, link)
        except UnavailableError as error:
            self._run.feed(m.PrefillFailed(action.leg, action.attempt, error))
        else:
            self._prefill = link

    def _open_decode(self, action: m.OpenDecode) -> None:
        if self._decode is not None:
            self._decode.note_kv(self._fleet)  # of an earlier attempt
        session = self._fleet.registry.decode[action.worker]
        link = DecodeLink(self._run, session, action, self._decode_accepted)
        start = decode_pb2.DecodeStart(
            attempt=wire.attempt_to_wire(self._run.attempt_id(action.leg, action.attempt)),
            generation=wire.generation_to_wire(self._run.with_time_left(action.generation)),
            ticket=action.ticket,
            hint=None if action.ticket is not None else self._hint(action.worker, action.generation),
            trace_parent=self._run.trace_parent,
        )
        try:
            link.handle = session.open(start, link)
        except UnavailableError as error:
            self._run.feed(m.DecodeFailed(action.leg, action.attempt, error))
        else:
            self._decode = link

    def _hint(self, reader: str, generation: Generation) -> common_pb2.PrefixHint | None:
        hint = self._fleet.hint(reader, generation)
        return None if hint is None else wire.prefix_hint_to_wire(hint)

    def _resume_decode(self, action: m.ResumeDecode) -> None:
        assert self._decode is not None
        self._decode.attempt = action.attempt
        resume = decode_pb2.DecodeResume(
            attempt=wire.attempt_to_wire(self._run.attempt_id(action.leg, action.attempt)),
            choices=map(wire.choice_state_to_wire, action.choices),
        )
        self._decode.session.resume(self._decode.handle, resume)


def _ending(finished: decode_pb2.ChoiceFinished) -> Ending:
    reason = wire.finish_reason_from_wire(finished.reason) or FinishReason.ERROR
    stop_id = finished.stop_token_id if finished.HasField("stop_token_id") else None
    return Ending(finished.choice, reason, finished.num_tokens, stop_id)
