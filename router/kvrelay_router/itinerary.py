"""The state machine of one request over its (prefill, decode) pair. Pure: events in, actions out.

    place -> [encode ->] open prefill -> Accepted{ticket} -> open decode -> HandoffDone -> tokens ... -> complete
      |                         \\-> Finished{first token}: to the client at once
      \\-> decode alone: open decode without a ticket --------------------> tokens ...

What goes wrong has a cheaper plan than failing: a refused ticket is offered to another decode worker, a lost
hand-off is resumed where it was or placed anew with the committed tokens (PROTOCOL C). A request begins as one
leg with all its choices; once choices have tokens of their own, a new placement takes one leg per choice.

No I/O, no clock, no asyncio; text and clients are not known here.
"""

from __future__ import annotations

import msgspec

from kvrelay.v1.common_pb2 import KvTicket
from kvrelay_core.errors import InternalError, KvRelayError, UnavailableError, UnsupportedError, WorkerLostError
from kvrelay_core.request import FinishReason, FirstToken, Generation
from kvrelay_router import encode_messages as e
from kvrelay_router import itinerary_messages as m
from kvrelay_router.committer import Committer, Ending, Token
from kvrelay_router.encode_stage import EncodeStage
from kvrelay_router.leg import DecodeState, Leg, PrefillState
from kvrelay_router.resume import may_resume
from kvrelay_router.worker_errors import is_refusal, is_unfit, is_worth_another_place

# A request that was on this many workers when they were lost may be what they died of (PROTOCOL C5).
MAX_DEATHS = 2


class Itinerary:
    """`handle(event)` returns what to do, in order. After Complete or Fail nothing comes any more."""

    def __init__(self, request_id: str, generation: Generation, max_replacements: int = 1) -> None:
        """`max_replacements`: new placements after a lost hand-off, a lost decode worker or the like."""
        self._generation = generation
        self._max_replacements = max_replacements
        self.committer = Committer(choice.index for choice in generation.choices)
        self._attempt = 0
        self._legs: dict[str, Leg] = {}
        self._died_on: set[str] = set()  # workers, of all legs: they carry the same prompt
        self._actions: list[m.Action] = []
        self._do = self._actions.append
        self.is_over = False
        self._encoding = EncodeStage(generation.media, self._do)
        self._first = Leg(request_id, tuple(choice.index for choice in generation.choices))

    @property
    def num_attempts(self) -> int:
        return self._attempt

    @property
    def legs(self) -> tuple[Leg, ...]:
        return tuple(self._legs.values())

    def start(self) -> list[m.Action]:
        self._begin_attempt(self._first)
        self._place(self._first)
        return self._take_actions()

    def handle(self, event: m.Event) -> list[m.Action]:
        if self.is_over:
            return []
        match event:
            case m.Abandon(error):
                self._fail(error)
            case m.StopChoice(choice):
                self._stop(choice)
            case m.LegEvent(leg=key, attempt=attempt):
                leg = self._legs.get(key)
                if leg is None or leg.attempt != attempt:
                    return []
                self._handle_leg(leg, event)
        # Tokens alone, the many, change nothing about where the request stands.
        if not isinstance(event, m.DecodeTokens) or any(isinstance(action, m.FinishChoice) for action in self._actions):
            self._settle()
        return self._take_actions()

    def _handle_leg(self, leg: Leg, event: m.LegEvent) -> None:
        match event:
            case m.DecodeTokens(tokens=tokens):
                self._on_decode_tokens(leg, tokens)
            case m.DecodeEnding(ending=ending):
                self._on_decode_ending(leg, ending)
            case m.Placed(route=route):
                self._on_placed(leg, route)
            case m.Unplaced(error=error, all_refused=all_refused) if leg.is_placing:
                self._fail(leg.unplaced_error(error, all_refused=all_refused))
            case e.Encoded() | e.EncodeFailed() if leg.is_encoding:
                self._on_encode(leg, event)
            case m.PrefillAccepted(ticket=ticket):
                self._on_accepted(leg, ticket)
            case m.PrefillFinished(tokens=first):
                self._on_prefill_finished(leg, first)
            case m.PrefillFailed(error=error):
                self._on_prefill_gone(leg, error, lost=isinstance(error, WorkerLostError))
            case m.PrefillLost(error=error):
                self._on_prefill_gone(leg, error, lost=True)
            case m.HandoffDone():
                leg.handoff_done()
            case m.HandoffLost():
                self._on_handoff_lost(leg, event)
            case m.HandedBack(error=error):
                self._on_handed_back(leg, error)
            case m.DecodeFailed(error=WorkerLostError() as error):
                self._on_decode_lost(leg, error)
            case m.DecodeFailed(error=error):
                self._on_decode_failed(leg, error)
            case m.DecodeLost(error=error):
                self._on_decode_lost(leg, error)

    # ------------------------------------------------------------------------------------- placement

    def _begin_attempt(self, leg: Leg) -> None:
        self._attempt += 1
        leg.begin_attempt(self._attempt)
        self._legs[leg.key] = leg
        for choice in leg.choices:
            self.committer.supersede(choice, self._attempt)
        leg.committed_before = leg.num_committed(self.committer)

    def _place(self, leg: Leg, prefill: str | None = None) -> None:
        leg.is_placing = True
        self._do(m.Place(leg.key, leg.attempt, frozenset(leg.refused_by), frozenset(leg.lost_on), prefill))

    def _on_placed(self, leg: Leg, route: m.Route) -> None:
        if not leg.is_placing:
            return
        leg.is_placing = False
        leg.placed_on = route
        if leg.ticket is not None:
            self._open_decode(leg)
            return
        leg.generation = msgspec.structs.replace(self._generation, choices=leg.states(self.committer))
        if route.prefill is None and self._encoding.has_items:
            self._fail(UnsupportedError("images need a prefill worker; start one, and the router with --prefill"))
        elif route.prefill is None:
            self._open_decode(leg)
        elif not self._encoding.begin(leg):
            self._open_prefill(leg)

    def _on_encode(self, leg: Leg, event: e.Encoded | e.EncodeFailed) -> None:
        if (error := self._encoding.handle(leg, event)) is not None:
            self._fail(error)
        elif not leg.is_encoding:
            self._open_prefill(leg)

    def _open_prefill(self, leg: Leg) -> None:
        assert leg.generation is not None and leg.route.prefill is not None
        leg.wants_handoff = any(
            self._generation.sampling.max_tokens - self.committer.next_position(choice) > 1 for choice in leg.choices
        )
        leg.prefill = PrefillState.OPEN
        worker, tickets = leg.route.prefill, self._encoding.tickets(leg)
        self._do(m.OpenPrefill(leg.key, leg.attempt, worker, leg.generation, leg.wants_handoff, tickets))

    def _open_decode(self, leg: Leg) -> None:
        assert leg.generation is not None
        leg.decode = DecodeState.OPEN
        self._do(m.OpenDecode(leg.key, leg.attempt, leg.route.decode, leg.generation, leg.ticket))
        self._abort_choices(leg, tuple(filter(self.committer.is_over, leg.choices)))  # before an earlier decode took it

    def _place_anew(self, leg: Leg, cause: KvRelayError, *, counts: bool) -> None:
        """With what is committed so far. `counts`: against the request's number of re-placements."""
        leg.cause = cause
        deaths = self._num_deaths(leg)
        if deaths >= MAX_DEATHS:
            message = f"{deaths} workers were lost while they served this request; it is not tried again"
            self._fail(UnavailableError(f"{message} ({cause.message})"))
        elif counts and leg.replacements >= self._max_replacements:
            self._fail(cause)
        else:
            leg.replacements += counts
            del self._legs[leg.key]
            leg.choices = pending = tuple(choice for choice in leg.choices if not self.committer.is_over(choice))
            # Several choices travel together only while none of them has tokens: they fork from one prompt.
            for next_leg in leg.split(pending) if any(map(self.committer.next_position, pending)) else [leg]:
                self._begin_attempt(next_leg)
                self._place(next_leg)

    # --------------------------------------------------------------------------------------- prefill

    def _on_accepted(self, leg: Leg, ticket: KvTicket | None) -> None:
        if leg.prefill is not PrefillState.OPEN:
            return
        leg.prefill = PrefillState.ACCEPTED
        if not leg.wants_handoff:
            return
        if ticket is None:
            self._fail(InternalError("prefill accepted without a ticket though a hand-off was asked for"))
            return
        leg.ticket = ticket
        self._open_decode(leg)

    def _on_prefill_finished(self, leg: Leg, first_tokens: tuple[FirstToken, ...]) -> None:
        if leg.prefill not in (PrefillState.OPEN, PrefillState.ACCEPTED):
            return
        leg.prefill_finished()
        for first in first_tokens:
            if first.choice not in leg.choices:
                continue
            self._commit(leg, Token(first.choice, first.position, first.token_id, first.logprobs))
            if first.finish_reason is not None:
                # As decode says it of any later token: an end of sequence is a stop token, too.
                stop_id = first.token_id if first.finish_reason is FinishReason.STOP else None
                self._end(leg, Ending(first.choice, first.finish_reason, first.position + 1, stop_id))
        if leg.ticket is None and not leg.is_over(self.committer):
            self._fail(InternalError("prefill finished without a ticket, and the request did not end there"))

    def _on_prefill_gone(self, leg: Leg, error: KvRelayError, *, lost: bool) -> None:
        if leg.prefill in (PrefillState.NONE, PrefillState.CLOSED):
            return
        was, leg.prefill = leg.prefill, PrefillState.CLOSED
        self._encoding.end(leg)
        counts = self._encoding.counts_as_replacement(leg, error)
        assert leg.route.prefill is not None
        if lost:
            self._note_death(leg, leg.route.prefill)
        if leg.decode is not DecodeState.NONE:
            # Decode's Follow ends too: it says HandoffLost, unless it has all it needs already.
            if not lost and not is_worth_another_place(error):
                self._fail(error)
        elif not lost and was is PrefillState.OPEN and is_refusal(error):
            leg.refused_by.add(leg.route.prefill)
            self._place_anew(leg, error, counts=False)
        elif lost or is_worth_another_place(error):
            self._place_anew(leg, error, counts=counts)
        else:
            self._fail(error)

    def _close_prefill(self, leg: Leg) -> None:
        if leg.prefill not in (PrefillState.NONE, PrefillState.CLOSED):
            assert leg.route.prefill is not None
            action = m.ReleaseTicket if leg.prefill is PrefillState.FINISHED else m.CancelPrefill
            self._do(action(leg.key, leg.attempt, leg.route.prefill))
        leg.prefill = PrefillState.CLOSED
        self._encoding.end(leg)

    # ---------------------------------------------------------------------------------------- decode

    def _on_decode_tokens(self, leg: Leg, tokens: tuple[Token, ...]) -> None:
        if leg.decode in (DecodeState.OPEN, DecodeState.RUNNING):
            for token in tokens:
                self._commit(leg, token)

    def _on_decode_ending(self, leg: Leg, ending: Ending) -> None:
        if leg.decode not in (DecodeState.OPEN, DecodeState.RUNNING) or ending.choice not in leg.choices:
            return
        self._end(leg, ending)
        leg.decode_ended(ending.choice)

    def _on_handoff_lost(self, leg: Leg, event: m.HandoffLost) -> None:
        if leg.decode is not DecodeState.OPEN:
            return
        if leg.route.prefill is not None and isinstance(event.error, WorkerLostError):
            self._note_death(leg, leg.route.prefill)  # decode may notice before we do
        self._close_prefill(leg)
        if self._may_resume(leg, event.verified_tokens):
            self._resume(leg)
            return
        self._abort_decode(leg, "the hand-off is lost; the request is placed anew")
        leg.lost_on.update(worker for worker in (leg.route.prefill, leg.route.decode) if worker is not None)
        self._place_anew(leg, event.error, counts=True)

    def _may_resume(self, leg: Leg, verified_tokens: int) -> bool:
        if self._num_deaths(leg) >= MAX_DEATHS or self._encoding.needs_embeddings(verified_tokens):
            return False  # decode has no embeddings
        return may_resume(leg, self.committer, len(self._generation.prompt), verified_tokens)

    def _resume(self, leg: Leg) -> None:
        lost, route = leg.attempt, leg.route
        leg.choices = tuple(choice for choice in leg.choices if not self.committer.is_over(choice))
        self._begin_attempt(leg)
        leg.placed_on = route
        leg.decode = DecodeState.RUNNING
        self._do(m.ResumeDecode(leg.key, leg.attempt, route.decode, lost, leg.states(self.committer)))

    def _on_handed_back(self, leg: Leg, error: KvRelayError) -> None:
        if leg.decode not in (DecodeState.OPEN, DecodeState.RUNNING):
            return
        leg.decode = DecodeState.CLOSED
        self._close_prefill(leg)
        # Preemption is no fault; but without a new token since the last placement it could go on for ever.
        self._place_anew(leg, error, counts=leg.num_committed(self.committer) <= leg.committed_before)

    def _on_decode_failed(self, leg: Leg, error: KvRelayError) -> None:
        if leg.decode not in (DecodeState.OPEN, DecodeState.RUNNING):
            return
        was, leg.decode = leg.decode, DecodeState.CLOSED
        if was is DecodeState.OPEN and is_refusal(error) and self._refused_by_decode(leg, error):
            return
        self._close_prefill(leg)
        if is_unfit(error) or is_worth_another_place(error):
            leg.lost_on.add(leg.route.decode)
            self._place_anew(leg, error, counts=True)
        else:
            self._fail(error)

    def _refused_by_decode(self, leg: Leg, error: KvRelayError) -> bool:
        """Offers the request to another decode worker. False when that would not be for free."""
        if leg.holds_ticket:
            leg.refused_by.add(leg.route.decode)
            leg.decode = DecodeState.NONE
            leg.cause = error
            self._place(leg, prefill=leg.route.prefill)
            return True
        if leg.route.prefill is None and leg.num_committed(self.committer) <= leg.committed_before:
            leg.refused_by.add(leg.route.decode)
            self._place_anew(leg, error, counts=False)
            return True
        return False

    def _on_decode_lost(self, leg: Leg, error: KvRelayError) -> None:
        if leg.decode not in (DecodeState.OPEN, DecodeState.RUNNING):
            return
        leg.decode = DecodeState.CLOSED
        self._note_death(leg, leg.route.decode)
        self._close_prefill(leg)
        self._place_anew(leg, error, counts=True)

    def _abort_decode(self, leg: Leg, reason: str) -> None:
        if leg.decode in (DecodeState.OPEN, DecodeState.RUNNING):
            self._do(m.AbortDecode(leg.key, leg.attempt, leg.route.decode, reason))
        leg.decode = DecodeState.CLOSED

    def _abort_choices(self, leg: Leg, choices: tuple[int, ...]) -> None:
        """Of a leg that goes on with others."""
        if choices and leg.decode in (DecodeState.OPEN, DecodeState.RUNNING) and not leg.is_over(self.committer):
            self._do(m.AbortChoices(leg.key, leg.attempt, leg.route.decode, choices))
            for choice in choices:
                leg.decode_ended(choice)

    def _note_death(self, leg: Leg, worker: str) -> None:
        leg.died_on(worker)
        self._died_on.add(worker)

    def _num_deaths(self, leg: Leg) -> int:
        return max(leg.deaths, len(self._died_on))

    # ---------------------------------------------------------------------------------------- tokens

    def _commit(self, leg: Leg, token: Token) -> None:
        if token.choice not in leg.choices:
            return
        new = self.committer.offer(leg.attempt, token)
        if new:
            self._do(m.Commit(token.choice, new))
            self._finish(self.committer.take_ending(token.choice))

    def _end(self, leg: Leg, ending: Ending) -> None:
        self._finish(self.committer.end(leg.attempt, ending))

    def _stop(self, choice: int) -> None:
        """A stop string ended it where it stands."""
        if self.committer.stop(choice):
            for leg in [leg for leg in self._legs.values() if choice in leg.choices]:
                self._abort_choices(leg, tuple({choice} - leg.ended_at_decode))

    def _finish(self, ending: Ending | None) -> None:
        if ending is not None:
            self._do(m.FinishChoice(ending))

    # ------------------------------------------------------------------------------------------- end

    def _settle(self) -> None:
        """Closes the legs that have nothing left to do, and the request after the last one."""
        if self.is_over:
            return
        for leg in [leg for leg in self._legs.values() if leg.is_over(self.committer)]:
            self._close(leg, "every choice has ended")
        for leg in [leg for leg in self._legs.values() if leg.is_stranded]:
            # Decode sent all it had before it ended, so what is missing will not come any more.
            self._close_prefill(leg)
            self._place_anew(leg, InternalError("the workers ended before all tokens came"), counts=True)
        if not self._legs and not self.is_over:
            self.is_over = True
            self._do(m.Complete())

    def _close(self, leg: Leg, reason: str) -> None:
        self._abort_decode(leg, reason)
        self._close_prefill(leg)
        self._legs.pop(leg.key, None)

    def _fail(self, error: KvRelayError) -> None:
        if self.is_over:
            return
        for leg in list(self._legs.values()):
            self._close(leg, error.reason)
        self.is_over = True
        self._do(m.Fail(error))

    def _take_actions(self) -> list[m.Action]:
        actions = self._actions.copy()
        self._actions.clear()
        return actions
