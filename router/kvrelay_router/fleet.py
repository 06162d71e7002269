"""What a run needs of the cluster: candidates from the registry, the policy's choice, and the account of loads."""

from __future__ import annotations

from collections.abc import Mapping

from kvrelay_core.errors import UnavailableError
from kvrelay_router.itinerary_messages import Place, Route
from kvrelay_router.placement import Candidate, Candidates, LoadAccount, Placement, RequestView, eligible
from kvrelay_router.registry import Registry
from kvrelay_router.worker_session import WorkerSession


class Fleet:
    def __init__(self, registry: Registry, placement: Placement) -> None:
        self.registry = registry
        self.loads = LoadAccount()
        self._placement = placement

    def place(self, request: RequestView, place: Place) -> Route:
        """Raises UnavailableError when no worker may take it."""
        decode = eligible("decode", self._candidates(self.registry.decode), place.excluded, place.avoided)
        if place.prefill is None:
            prefill = eligible("prefill", self._candidates(self.registry.prefill), place.excluded, place.avoided)
        else:
            prefill = [Candidate(place.prefill, self.loads.outstanding(place.prefill))]
        decision = self._placement.place(request, Candidates(prefill, decode))
        session = self.registry.decode.get(decision.decode)
        if session is None or decision.prefill not in self.registry.prefill:
            raise UnavailableError(f"the placement chose an unknown pair {decision.prefill}, {decision.decode}")
        return Route(decision.prefill, decision.decode, session.description.decode_alone_tokens)

    def _candidates(self, sessions: Mapping[str, WorkerSession]) -> list[Candidate]:
        return [Candidate(key, self.loads.outstanding(key)) for key, session in sessions.items() if session.is_serving]
