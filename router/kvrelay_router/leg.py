"""The state of one leg of an itinerary: some choices of a request at one place at a time, a pair or decode alone.

`Itinerary` moves it; here are only the states and the transitions that concern nothing but the leg.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from kvrelay.v1.common_pb2 import EmbeddingTicket, KvTicket
from kvrelay_core.errors import KvRelayError, UnavailableError
from kvrelay_core.request import ChoiceState, Generation
from kvrelay_router.committer import Committer
from kvrelay_router.itinerary_messages import Route


class PrefillState(Enum):
    NONE = "not asked"
    OPEN = "asked"
    ACCEPTED = "its blocks are reserved"
    FINISHED = "computed; it holds the ticket for decode"
    CLOSED = "it holds nothing for this attempt"


class DecodeState(Enum):
    NONE = "not asked"
    OPEN = "asked; pulling"
    RUNNING = "has all KV"
    CLOSED = "it holds nothing for this attempt"


@dataclass(slots=True)
class Leg:
    key: str  # the request id that its workers see
    choices: tuple[int, ...]
    attempt: int = 0
    is_placing: bool = False
    placed_on: Route | None = None
    prefill: PrefillState = PrefillState.NONE
    decode: DecodeState = DecodeState.NONE
    wants_handoff: bool = False
    generation: Generation | None = None  # as both workers get it
    ticket: KvTicket | None = None
    unencoded: set[bytes] = field(default_factory=set)  # media items without a ticket yet
    embeddings: dict[bytes, EmbeddingTicket] = field(default_factory=dict)  # of the others, until prefill has finished
    encoded_by: dict[bytes, str] = field(default_factory=dict)  # item -> encoder
    encode_failures: int = 0
    ended_at_decode: set[int] = field(default_factory=set)
    died_at: set[str] = field(default_factory=set)
    # Over all attempts:
    replacements: int = 0
    deaths: int = 0
    refused_by: set[str] = field(default_factory=set)
    lost_on: set[str] = field(default_factory=set)
    avoided_encoders: set[str] = field(default_factory=set)
    lost_embeddings: int = 0
    cause: KvRelayError | None = None  # why it is placed again
    committed_before: int = 0  # tokens when the attempt began

    @property
    def route(self) -> Route:
        assert self.placed_on is not None, "not placed yet"
        return self.placed_on

    @property
    def is_encoding(self) -> bool:
        return bool(self.unencoded)

    @property
    def is_prefilling(self) -> bool:
        return self.prefill in (PrefillState.OPEN, PrefillState.ACCEPTED)

    @property
    def holds_ticket(self) -> bool:
        return self.ticket is not None and self.prefill in (PrefillState.ACCEPTED, PrefillState.FINISHED)

    @property
    def is_stranded(self) -> bool:
        """No worker works for it, and none is being sought."""
        decode_works = self.decode in (DecodeState.OPEN, DecodeState.RUNNING)
        return not (self.is_placing or self.is_encoding or self.is_prefilling or decode_works)

    def begin_attempt(self, attempt: int) -> None:
        assert attempt > self.attempt
        self.attempt = attempt
        self.is_placing = False
        self.placed_on = None
        self.prefill = PrefillState.NONE
        self.decode = DecodeState.NONE
        self.wants_handoff = False
        self.generation = None
        self.ticket = None
        self.unencoded = set()
        self.embeddings = {}
        self.encoded_by = {}
        self.encode_failures = 0
        self.ended_at_decode = set()
        self.died_at = set()

    def prefill_finished(self) -> None:
        waits_for_decode = self.ticket is not None and self.decode in (DecodeState.NONE, DecodeState.OPEN)
        self.prefill = PrefillState.FINISHED if waits_for_decode else PrefillState.CLOSED
        self.embeddings = {}  # it has released them

    def handoff_done(self) -> None:
        if self.decode is not DecodeState.OPEN:
            return
        self.decode = DecodeState.RUNNING
        if self.prefill is PrefillState.FINISHED:
            self.prefill = PrefillState.CLOSED

    def decode_ended(self, choice: int) -> None:
        """Notes the end of a choice at decode, which is through with the leg after the last one."""
        self.ended_at_decode.add(choice)
        if self.ended_at_decode >= set(self.choices):
            self.decode = DecodeState.CLOSED

    def died_on(self, worker: str) -> None:
        """A worker was lost with the leg on it; counted once an attempt, however many say so."""
        if worker not in self.died_at:
            self.died_at.add(worker)
            self.deaths += 1
        self.lost_on.add(worker)

    def is_over(self, committer: Committer) -> bool:
        return all(map(committer.is_over, self.choices))

    def num_committed(self, committer: Committer) -> int:
        return sum(map(committer.next_position, self.choices))

    def states(self, committer: Committer) -> tuple[ChoiceState, ...]:
        return tuple(ChoiceState(choice, committer.committed(choice)) for choice in self.choices)

    def unplaced_error(self, error: KvRelayError, *, all_refused: bool) -> KvRelayError:
        """What the request fails with when `error` kept it from being placed."""
        if self.cause is None:
            return error
        return self.cause if all_refused else UnavailableError(f"{error.message}; before that: {self.cause.message}")

    def split(self, choices: tuple[int, ...]) -> list[Leg]:
        """A leg for each choice."""
        return [self] if len(choices) == 1 else [self._for_choice(choice) for choice in choices]

    def _for_choice(self, choice: int) -> Leg:
        """A leg of its own for one choice, with the history of this one. Its key differs, so that the choices do
        not supersede each other on a worker."""
        return Leg(
            key=f"{self.key}.{choice}",
            choices=(choice,),
            attempt=self.attempt,
            replacements=self.replacements,
            deaths=self.deaths,
            refused_by=set(self.refused_by),
            lost_on=set(self.lost_on),
            avoided_encoders=set(self.avoided_encoders),
            lost_embeddings=self.lost_embeddings,
            cause=self.cause,
        )
