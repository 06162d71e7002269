"""Thousands of random hand-offs between a source and a reader, a share of them disturbed, every block by its digest.

The source's block is digested when prefill has written it, the reader's when it is delivered. Four hand-offs are
under way at a time; chance decides who goes on. Disturbances are methods named `disturb_...`.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from handoff_sides import ADDRESS, LAYOUT, MODEL, SourceSide, fill_block, first_tokens, make_sequence
from storm_thread_links import make_link

from kvrelay_core.clock import ManualClock
from kvrelay_core.error_info import info_of
from kvrelay_core.errors import RequestCancelledError, WorkerLostError
from kvrelay_engine.handoff_reader import HandoffArrived, HandoffBroken, HandoffReader, ReaderLimits
from kvrelay_engine.messages import (
    ConnectPeer,
    DisconnectPeer,
    Event,
    FollowAttach,
    FollowBeat,
    FollowComplete,
    FollowFailed,
    FollowLost,
    FollowReady,
    FollowRelease,
    HandoffComplete,
    HandoffFailed,
    HandoffReady,
    HandoffRelease,
    PeerFailed,
    ReleaseTicket,
)
from kvrelay_engine.sequence import Sequence
from kvrelay_transfer.ticket import KvTicket

NUM_BLOCKS = 40
MAX_UNDER_WAY = 4
MAX_TOKENS = 26  # seven blocks, the last one partial
LIMITS = ReaderLimits(max_reads=3, max_read_bytes=3 * LAYOUT.block_bytes)
TURN_S = 0.05  # on the clock of both sides
BEAT_EVERY = 10  # turns
CHECK_EVERY = 64  # turns
EPOCH_BIT = 1 << 32


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


@dataclass(eq=False)
class Flight:
    """One hand-off: what prefill wrote, and how far either side is with it."""

    prefill: Sequence
    decode: Sequence
    ticket: KvTicket
    digests: list[bytes]
    disturbance: str | None
    disturb_at: int  # sealed blocks
    side: SourceSide
    num_sealed: int = 0
    is_prefilling: bool = True
    is_reading: bool = True
    is_silent: bool = False  # its reader sends no beats any more

    @property
    def id(self) -> int:
        return self.prefill.request.id


@dataclass
class HandoffStorm:
    connector: str
    seed: int
    directory: Path
    ends: Counter[str] = field(default_factory=Counter)
    num_delivered_blocks: int = 0
    num_disturbed: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.clock = ManualClock()
        self.events: list[Event] = []
        self.link = make_link(self.connector, self.clock, NUM_BLOCKS, self.events.append, self.directory)
        self.no_room_for: set[int] = set()
        self.reader = HandoffReader(
            self.link.pool, LAYOUT, {self.connector: self.link.connector}, self.clock, self.events.append,
            self._reserve, model_fingerprint=MODEL, limits=LIMITS,
        )  # fmt: skip
        self.flights: dict[int, Flight] = {}
        self._deck: list[str] = []
        self._next_id = 1
        self._turn = 0
        self._start_source()

    def run(self, num_handoffs: int, disturbed_share: float, least_ends: Counter[str] | None = None) -> None:
        """Ends before `num_handoffs` once each of `least_ends` was met so often."""
        while self._next_id <= num_handoffs or self.flights:
            if least_ends is not None and self.ends >= least_ends:
                num_handoffs = 0
            if self._next_id <= num_handoffs and len(self.flights) < MAX_UNDER_WAY:
                self._accept(self.random.random() < disturbed_share)
            self._take_turn()
        self._wind_up()

    def close(self) -> None:
        self.reader.close()
        self._exchange()
        self.link.close()
        self.side.close()

    # ------------------------------------------------------------------------------------------ one hand-off

    def _accept(self, is_disturbed: bool) -> None:
        num_tokens = self.random.randint(1, MAX_TOKENS)
        if not self.side.source.can_accept(LAYOUT.blocks_for(num_tokens)):
            return
        first = 1000 * (self._next_id % 1000)
        tokens = [self._next_id, *range(first, first + num_tokens - 1)]
        prefill = make_sequence(tokens, self._next_id)
        prefill.blocks = self.side.pool.reserve(LAYOUT.blocks_for(num_tokens))
        digests = [self._write(block) for block in prefill.blocks]
        ticket = self.side.source.accept(prefill)
        disturbance = self._draw_disturbance() if is_disturbed else None
        decode = make_sequence(tokens, self._next_id)
        disturb_at = self.random.randint(0, len(digests))
        if disturbance == "no_room":
            disturb_at = 0  # room is taken at the first Ready, and later there is nothing to disturb
        flight = Flight(prefill, decode, ticket, digests, disturbance, disturb_at, self.side)
        self.flights[flight.id] = flight
        self._next_id += 1
        if not self._is_connected:  # as a service does before it hands a ticket on
            self._connect()
        self.reader.open(decode, ticket)
        self.side.source.handle(FollowAttach(flight.id, ticket))

    def _draw_disturbance(self) -> str:
        """In an order of chance, but each as often as any other."""
        if not self._deck:
            self._deck = self.random.sample(DISTURBANCES, len(DISTURBANCES))
        self.num_disturbed += 1
        return self._deck.pop()

    def _write(self, block: int) -> bytes:
        data = self.random.randbytes(LAYOUT.block_bytes)
        self.side.memory.block_rows[block].numpy()[:] = memoryview(data)
        return digest(data)

    def _seal(self, flight: Flight) -> None:
        flight.num_sealed += self.random.randint(1, 3)
        self.side.source.sealed(flight.prefill, flight.num_sealed)
        if flight.num_sealed >= len(flight.digests):
            self.side.source.finished(flight.prefill, first_tokens())
            self._end_prefill(flight)

    def _take_turn(self) -> None:
        self._turn += 1
        self.clock.advance(TURN_S)
        prefilling = [flight for flight in self.flights.values() if flight.is_prefilling]
        if prefilling:
            self._seal(self.random.choice(prefilling))
        for flight in list(self.flights.values()):
            if flight.disturbance is not None and flight.num_sealed >= flight.disturb_at:
                name, flight.disturbance = flight.disturbance, None
                getattr(self, f"disturb_{name}")(flight)
        self.link.progress(self.reader, self.random)
        self._exchange()
        assert all(map(self.link.pool.references, self.link.written_blocks())), "a read writes to a free block"
        if self._turn % BEAT_EVERY == 0:
            for flight in self.flights.values():
                if flight.is_reading and not flight.is_silent:
                    self.side.source.handle(FollowBeat(flight.id))
        if self._turn % CHECK_EVERY == 0:
            self.link.pool.check_integrity()
            self.side.pool.check_integrity()

    def _exchange(self) -> None:
        """What services would carry, in both directions."""
        for event in self.side.take_events():
            match event:
                case FollowReady(follow, num_blocks):
                    self.reader.handle(HandoffReady(follow, num_blocks))
                case FollowComplete(follow, tokens, partial):
                    self.reader.handle(HandoffComplete(follow, tokens, partial))
                case FollowFailed(follow, error):
                    self.reader.handle(HandoffFailed(follow, error))
                case _:
                    pass
        for outcome in self.reader.poll():
            self._check(outcome)
        taken = list(self.events)
        self.events.clear()
        for event in taken:
            match event:
                case HandoffRelease(request_id, reason):
                    self.side.source.handle(FollowRelease(request_id, reason))
                case PeerFailed():
                    self._is_connected = False
                case _:
                    self.link.take(event)
        self.side.source.tick()

    # ----------------------------------------------------------------------------------------- disturbances

    def disturb_reuse_under_read(self, flight: Flight) -> None:
        for block in flight.ticket.groups[0].blocks:
            self.side.overwrite(block)

    def disturb_word_between(self, flight: Flight) -> None:
        """Once, when the next data of anybody has been copied and its words have not been read."""

        def bump() -> None:
            self.link.between = lambda: None
            self.side.memory.words.bump(flight.ticket.groups[0].blocks[0])

        self.link.between = bump

    def disturb_other_epoch(self, flight: Flight) -> None:
        """Blocks of another start of the engine, whose generations happen to be the same."""
        for block in flight.ticket.groups[0].blocks:
            self.side.memory.words._words[block] ^= EPOCH_BIT
            fill_block(self.side.memory, block, seed=flight.id)

    def disturb_reuse_after_release(self, flight: Flight) -> None:
        """The ticket ends by a call; what is free is given to others at once."""
        self.side.source.handle(ReleaseTicket(1, flight.ticket))
        self._reuse_free()

    def disturb_cancel(self, flight: Flight) -> None:
        if flight.is_reading:
            self.reader.abort(flight.id)
            self._end_reading(flight, "cancelled")
        self._reuse_free()

    def disturb_follow_lost(self, flight: Flight) -> None:
        self.side.source.handle(FollowLost(flight.id))
        flight.is_silent = True
        self.reader.handle(HandoffFailed(flight.id, info_of(WorkerLostError("the Follow did not come back"))))

    def disturb_follow_returns(self, flight: Flight) -> None:
        self.side.source.handle(FollowLost(flight.id))
        self.side.source.handle(FollowAttach(flight.id, flight.ticket))

    def disturb_no_room(self, flight: Flight) -> None:
        self.no_room_for.add(flight.id)

    def disturb_hung_reader(self, flight: Flight) -> None:
        """Its beats stay away until the lease is over; the reads that it has posted may land afterwards."""
        flight.is_silent = True

    def disturb_failed_prefill(self, flight: Flight) -> None:
        if flight.is_prefilling:
            self.side.source.failed(flight.id, RequestCancelledError("cancelled"))
            self._end_prefill(flight)

    def disturb_lost_link(self, flight: Flight) -> None:
        self.reader.handle(DisconnectPeer(ADDRESS))
        self._connect()

    def disturb_restarted_source(self, flight: Flight) -> None:
        """Another start of the engine at the same address; what was under way is lost with the old one."""
        old = self.side
        for other in self.flights.values():
            if other.is_reading:
                self.reader.handle(HandoffFailed(other.id, info_of(WorkerLostError("the source has died"))))
        for other in list(self.flights.values()):
            other.is_prefilling = False
            self._forget(other)
        self._start_source()
        self._exchange()
        old.close()

    def _reuse_free(self) -> None:
        """Others write to everything that is free, on both sides."""
        for pool, memory in ((self.side.pool, self.side.memory), (self.link.pool, self.link.memory)):
            blocks = pool.reserve(pool.num_free)
            if blocks:
                memory.block_rows[blocks] = 255
            pool.release(blocks)

    # ---------------------------------------------------------------------------------------- what must hold

    def _check(self, outcome: HandoffArrived | HandoffBroken) -> None:
        flight = self.flights[outcome.request_id]
        blocks = flight.decode.blocks
        delivered = [digest(self.link.memory.block_rows[block].numpy().tobytes()) for block in blocks]
        assert delivered == flight.digests[: len(blocks)], f"hand-off {flight.id}: KV that nobody wrote for it"
        self.num_delivered_blocks += len(blocks)
        if isinstance(outcome, HandoffArrived):
            assert len(blocks) == len(flight.digests), f"hand-off {flight.id} arrived without all its blocks"
            self._end_reading(flight, "arrived")
        else:
            self._end_reading(flight, type(outcome.error).__name__)
        self.link.pool.release(blocks)

    def _wind_up(self) -> None:
        """Time passes, and nothing is held on either side."""
        self.clock.advance(100.0)
        give_up = 10_000
        while self.reader.is_busy and give_up:
            give_up -= 1
            self.link.progress(self.reader, self.random)
            self._exchange()
        self._exchange()
        assert not self.reader.is_busy
        assert self.link.pool.num_in_use == self.reader.num_transfers == self.reader.num_quarantined == 0
        assert self.side.pool.num_in_use == self.side.source.num_leases == self.side.source.num_pinned == 0
        self.link.pool.check_integrity()
        self.side.pool.check_integrity()

    # --------------------------------------------------------------------------------------------- internals

    def _reserve(self, sequence: Sequence, num_blocks: int) -> list[int] | None:
        if sequence.request.id in self.no_room_for or num_blocks > self.link.pool.num_free:
            return None
        return self.link.pool.reserve(num_blocks)

    def _start_source(self) -> None:
        self.side = SourceSide(self.clock, NUM_BLOCKS)
        self._connect()

    def _connect(self) -> None:
        self._is_connected = True
        self.reader.handle(ConnectPeer(self.side.peer(self.link.offer_of(self.side))))

    def _end_prefill(self, flight: Flight) -> None:
        flight.is_prefilling = False
        self.side.pool.release(flight.prefill.blocks)
        self._forget(flight)

    def _end_reading(self, flight: Flight, end: str) -> None:
        flight.is_reading = False
        self.no_room_for.discard(flight.id)
        self.ends[end] += 1
        self._forget(flight)

    def _forget(self, flight: Flight) -> None:
        if not flight.is_prefilling and not flight.is_reading:
            self.flights.pop(flight.id, None)


DISTURBANCES = sorted(name.removeprefix("disturb_") for name in vars(HandoffStorm) if name.startswith("disturb_"))
