"""Carries out one request's itinerary: actions become messages to workers and the client, answers become events.

Everything happens by plain calls within the event that caused it; a run owns no task. Decides nothing itself.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from kvrelay.v1 import decode_pb2, inference_pb2, prefill_pb2
from kvrelay_core.clock import Clock
from kvrelay_core.errors import InternalError, KvRelayError
from kvrelay_core.request import AttemptId, FinishReason, Generation, Slo, Usage
from kvrelay_core.rpc import wire
from kvrelay_router import itinerary_messages as m
from kvrelay_router.choice_output import ChoiceOutput
from kvrelay_router.committer import Ending, Token
from kvrelay_router.fleet import Fleet
from kvrelay_router.itinerary import Itinerary
from kvrelay_router.leg_link import LegLink
from kvrelay_router.placement import RequestView
from kvrelay_router.placement_wait import Outcome, WaitTerms
from kvrelay_router.request_timing import RequestTimer
from kvrelay_router.response_stream import ResponseStream
from kvrelay_router.validation import CheckedRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunIdentity:
    router_id: str
    request_id: str  # unique in this router; the client's own id is only echoed
    trace_parent: str = ""  # of its span, for the workers'


class RequestRun:
    """`start()`, then iterate `response`. `abandon()` at any time; it has no effect when the run is over."""

    def __init__(
        self,
        identity: RunIdentity,
        request: CheckedRequest,
        fleet: Fleet,
        outputs: dict[int, ChoiceOutput],
        response: ResponseStream,
        clock: Clock,
        *,
        arrived_s: float,
        deadline_at_s: float | None,
        max_replacements: int,
        wait_terms: WaitTerms,
    ) -> None:
        self.response = response
        self._identity = identity
        self._request = request
        self.items = {item.content_hash: item for item in request.items}
        self.media_rows = Counter[bytes]()  # of each item's embedding
        for reference in request.generation.media:
            rows = reference.first_row + reference.num_tokens
            self.media_rows[reference.content_hash] = max(self.media_rows[reference.content_hash], rows)
        self._fleet = fleet
        self._outputs = outputs
        self._clock = clock
        self._deadline_at_s = deadline_at_s
        self._wait_terms = wait_terms
        self._itinerary = Itinerary(identity.request_id, request.generation, max_replacements)
        self._timer = RequestTimer(clock, arrived_s)
        self._links: dict[str, LegLink] = {}
        self._events: deque[m.Event] = deque()
        self._is_busy = False
        self._is_broken = False

    def start(self) -> None:
        self._carry_out(self._itinerary.start())

    def abandon(self, error: KvRelayError) -> None:
        self.feed(m.Abandon(error))

    def feed(self, event: m.Event) -> None:
        """An event that comes up while another one is carried out waits its turn."""
        if self._is_broken:
            return
        self._events.append(event)
        if not self._is_busy:
            self._carry_out([])

    def do_guarded(self, step: Callable[[], None]) -> None:
        """Does what a timer or another part of the router asks for: a bug in it breaks this request alone."""
        try:
            step()
        except Exception:
            self._break_off()

    def _carry_out(self, actions: list[m.Action]) -> None:
        self._is_busy = True
        try:
            while True:
                for action in actions:
                    self._do(action)
                if not self._events:
                    break
                actions = self._itinerary.handle(self._events.popleft())
        except Exception:
            # A bug. It must not take the session, and so every other request, with it.
            self._break_off()
        finally:
            self._is_busy = False

    def _break_off(self) -> None:
        """After an exception, which it logs."""
        log.exception("request %s broke", self._identity.request_id)
        self._is_broken = True
        self._events.clear()
        for link in self._links.values():
            link.abandon()
        self.response.close(InternalError("the request met a bug in the router; see its log"))

    def _do(self, action: m.Action) -> None:
        match action:
            case m.Commit(choice=choice, tokens=tokens):
                self._commit(choice, tokens)
            case m.FinishChoice(ending=ending):
                self._finish_choice(ending)
            case m.Place():
                self._place(action)
            case m.LegAction(leg=leg):
                self._links[leg].do(action)
            case m.Complete():
                self._end(None)
            case m.Fail(error=error):
                self._end(error)

    # ----------------------------------------------------------------------------------- placement

    def _place(self, place: m.Place) -> None:
        legs = {leg.key for leg in self._itinerary.legs}
        for key in self._links.keys() - legs:
            self._links.pop(key).close()  # it was split, and others go on
        link = self._links.get(place.leg)
        if link is None:
            link = self._links[place.leg] = LegLink(self, self._fleet, self._wait_terms)
        view = self._view(place.leg)
        link.placement.place(view, place, lambda outcome: self._placed(link, view, outcome))

    def _placed(self, link: LegLink, view: RequestView, outcome: Outcome) -> None:
        place, route = outcome.place, outcome.route
        if route is None:
            assert outcome.error is not None
            self.feed(m.Unplaced(place.leg, place.attempt, outcome.error, outcome.all_refused))
            return
        link.charge(route, view, has_ticket=place.prefill is not None)
        registry = self._fleet.registry
        self._timer.prefill_worker = "" if route.prefill is None else registry.prefill[route.prefill].worker_id
        self._timer.decode_worker = registry.decode[route.decode].worker_id
        self.feed(m.Placed(place.leg, place.attempt, route))

    def _view(self, leg_key: str) -> RequestView:
        generation = self._request.generation
        leg = next(leg for leg in self._itinerary.legs if leg.key == leg_key)
        committed = max(map(self._itinerary.committer.next_position, leg.choices), default=0)
        return RequestView(
            prompt=generation.prompt,
            num_committed=committed,
            max_new_tokens=(generation.sampling.max_tokens - committed) * len(leg.choices),
            cache_salt=generation.cache_salt,
            session_id=self._request.session_id,
            priority=generation.priority,
            slo=self._slo_left(),
        )

    # ---------------------------------------------------------------------- what the links ask for

    def attempt_id(self, leg: str, attempt: int) -> AttemptId:
        return AttemptId(self._identity.router_id, leg, attempt)

    def with_time_left(self, generation: Generation) -> Generation:
        """With what is left now of the deadline and of the promise."""
        return msgspec.structs.replace(generation, deadline_s=self.time_left_s, slo=self._slo_left())

    @property
    def time_left_s(self) -> float | None:
        """Until the deadline; None: there is none."""
        return None if self._deadline_at_s is None else max(0.0, self._deadline_at_s - self._clock.now())

    def _slo_left(self) -> Slo:
        """The first token, once it is there, is promised no more."""
        slo = self._request.generation.slo
        if slo.ttft_s is None:
            return slo
        left_s = max(0.0, slo.ttft_s - (self._clock.now() - self._timer.started_s))
        return Slo(None if self._itinerary.committer.num_committed else left_s, slo.itl_s)

    def next_position(self, choice: int) -> int:
        return self._itinerary.committer.next_position(choice)

    def tokens(self, choice: int) -> tuple[int, ...]:
        """Prompt and committed tokens."""
        return self._request.generation.prompt + self._itinerary.committer.committed(choice)

    @property
    def trace_parent(self) -> str:
        return self._identity.trace_parent

    @property
    def generation(self) -> Generation:
        """As the request began: without committed tokens."""
        return self._request.generation

    @property
    def wants_logprobs(self) -> bool:
        return self._request.wants_logprobs

    def note_prefill_finished(self, finished: prefill_pb2.PrefillFinished) -> None:
        if self._itinerary.num_attempts == 1:  # a re-placement reuses KV of its own
            self._timer.queue_s = finished.queue_s
            self._timer.cached_tokens = finished.usage.cached_tokens

    def note_handoff(self, accepted: decode_pb2.DecodeAccepted) -> None:
        if accepted.HasField("handoff"):
            self._timer.handoff = wire.handoff_timing_from_wire(accepted.handoff)

    # ---------------------------------------------------------------------------------- the client

    def _commit(self, choice: int, tokens: Sequence[Token]) -> None:
        output = self._outputs[choice]
        if output.stop_string is not None:
            return
        self._timer.note_tokens(choice, len(tokens))
        self.response.put_piece(choice, output.push(tokens))
        if output.stop_string is not None:
            self._send_finish(choice, FinishReason.STOP, output.stop_string)
            self.feed(m.StopChoice(choice))

    def _finish_choice(self, ending: Ending) -> None:
        output = self._outputs[ending.choice]
        if output.stop_string is not None:
            return  # finished by it already
        self.response.put_piece(ending.choice, output.finish())
        if output.stop_string is not None:
            self._send_finish(ending.choice, FinishReason.STOP, output.stop_string)
            return
        stop = "" if ending.stop_token_id is None else str(ending.stop_token_id)
        self._send_finish(ending.choice, ending.reason, stop)

    def _send_finish(self, choice: int, reason: FinishReason, stop_reason: str) -> None:
        usage = Usage(len(self._request.generation.prompt), self._timer.cached_tokens, self._outputs[choice].num_tokens)
        finish = inference_pb2.Finish(
            index=choice,
            reason=wire.finish_reason_to_wire(reason),
            usage=wire.usage_to_wire(usage),
            timing=self._timer.timing(choice, self._itinerary.num_attempts),
            stop_reason=stop_reason,
        )
        self.response.put_finish(finish)

    def _end(self, error: KvRelayError | None) -> None:
        for link in self._links.values():
            link.close()
        self.response.close(error)
