"""What a run needs of the cluster: candidates from the registry, the policy's choice, and the account of loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvrelay_core.errors import InternalError
from kvrelay_router.itinerary_messages import Place, Route
from kvrelay_router.placement import Candidate, Candidates, LoadAccount, Placement, RequestView, eligible
from kvrelay_router.registry import Registry
from kvrelay_router.worker_load import reported_tokens
from kvrelay_router.worker_session import WorkerSession


@dataclass(frozen=True, slots=True)
class NoRoute:
    """No worker of `role` may take the request: none serves, or all that do have refused it."""

    role: str
    all_refused: bool


class Fleet:
    def __init__(self, registry: Registry, placement: Placement) -> None:
        self.registry = registry
        self.loads = LoadAccount()
        self._placement = placement
        registry.on_load = self._note_load

    def use(self, placement: Placement) -> None:
        """From the next request on."""
        self._placement = placement

    def place(self, request: RequestView, place: Place) -> Route | NoRoute:
        serving = self._serving(self.registry.decode)
        decode = eligible(serving, place.excluded, place.avoided)
        if not decode:
            return NoRoute("decode", all_refused=bool(serving))
        if place.prefill is not None:
            prefill = [Candidate(place.prefill, self.loads.load_of(place.prefill))]
        else:
            serving = self._serving(self.registry.prefill)
            prefill = eligible(serving, place.excluded, place.avoided)
            if self.registry.prefill and not prefill:
                return NoRoute("prefill", all_refused=bool(serving))
        decision = self._placement.place(request, Candidates(prefill, decode))
        session = self.registry.decode.get(decision.decode)
        if session is None or not (decision.prefill is None or decision.prefill in self.registry.prefill):
            raise InternalError(f"the placement chose an unknown pair {decision.prefill}, {decision.decode}")
        return Route(decision.prefill, decision.decode, session.description.decode_alone_tokens)

    def _serving(self, sessions: Mapping[str, WorkerSession[Any]]) -> list[Candidate]:
        return [Candidate(key, self.loads.load_of(key)) for key, session in sessions.items() if session.is_serving]

    def _note_load(self, session: WorkerSession[Any]) -> None:
        reported = 0 if session.load is None else reported_tokens(session.role, session.description, session.load)
        self.loads.note_report(session.key, reported)
