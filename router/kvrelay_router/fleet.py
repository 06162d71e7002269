"""What a run needs of the cluster: candidates from the registry, the policy's choice, the account of loads, and the
memory of where KV was left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvrelay_core.errors import InternalError
from kvrelay_core.hashing import hash_units, root_hash
from kvrelay_core.media.hash_keys import media_keys
from kvrelay_core.request import Generation, PrefixHint
from kvrelay_router.encoder_choice import EncoderChoice
from kvrelay_router.itinerary_messages import Place, Route
from kvrelay_router.kv_holders import KvHolders
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
        self.encoders = EncoderChoice()
        self._holders = KvHolders()
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

    # ------------------------------------------------------------------------------ where KV was left

    def note_kv(self, worker: str, generation: Generation, tokens: Sequence[int]) -> None:
        """The decode worker has computed or pulled the KV of `tokens`, the first ones of the request's."""
        session = self.registry.decode.get(worker)
        if session is not None:
            self._holders.note(worker, _unit_hashes(session, generation, tokens))

    def hint(self, reader: str, generation: Generation) -> PrefixHint | None:
        """Where `reader`, a worker of either role, may find KV of the beginning of the request's input."""
        session: WorkerSession[Any] | None = self.registry.prefill.get(reader) or self.registry.decode.get(reader)
        if session is None or not self._holders:
            return None
        decode = self.registry.decode
        found = self._holders.find(
            _unit_hashes(session, generation, generation.tokens_to_prefill),
            lambda key: key != reader and key in decode and decode[key].is_up,
        )
        if found is None:
            return None
        holder, num_units = found
        return PrefixHint(decode[holder].description.worker.address, num_units * _unit_tokens(session))

    def _serving(self, sessions: Mapping[str, WorkerSession[Any]]) -> list[Candidate]:
        return [Candidate(key, self.loads.load_of(key)) for key, session in sessions.items() if session.is_serving]

    def _note_load(self, session: WorkerSession[Any]) -> None:
        reported = 0 if session.load is None else reported_tokens(session.role, session.description, session.load)
        self.loads.note_report(session.key, reported)


def _unit_tokens(session: WorkerSession[Any]) -> int:
    """0: this worker does not say."""
    layouts = session.description.layouts
    return layouts[0].hash_unit_tokens if layouts else 0


def _unit_hashes(session: WorkerSession[Any], generation: Generation, tokens: Sequence[int]) -> list[bytes]:
    unit_tokens = _unit_tokens(session)
    if not unit_tokens:
        return []
    root = root_hash(session.description.model_fingerprint, cache_salt=generation.cache_salt)
    return hash_units(root, tokens, unit_tokens, media_keys(generation.media, unit_tokens))
