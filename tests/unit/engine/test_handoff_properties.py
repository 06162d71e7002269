"""A source and a reader under random orders of accept, seal, finish, fail, cancel, loss, time, reuse and landing.

What must hold: a hand-off that arrives holds the very bytes that prefill wrote; what a broken one keeps does
too; no read under way writes to a free block; and when everything is over, each block of both pools is free
exactly once. The walks are weighted so that most requests get somewhere.
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from handoff_pair import HandoffPair
from handoff_sides import ADDRESS, LAYOUT, first_tokens, make_sequence
from msgspec.structs import replace
from split_kv import Bytes, glue

from kvrelay_core.errors import (
    LeaseExpiredError,
    OverloadedError,
    RequestCancelledError,
    StaleTicketError,
    TransferError,
)
from kvrelay_engine.handoff_reader import HandoffArrived, HandoffBroken, ReaderLimits
from kvrelay_engine.messages import (
    ConnectPeer,
    DisconnectPeer,
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
    PrefillStreamClosed,
    ReleaseTicket,
)
from kvrelay_engine.sequence import Sequence
from kvrelay_transfer.connectors.base import TransferState
from kvrelay_transfer.connectors.memory import MemoryTransfer
from kvrelay_transfer.ticket import KvTicket

LIMITS = ReaderLimits(max_reads=3, max_read_bytes=2 * 1024)  # two blocks of 4 tokens a read
NUM_WALKS = 60
MAX_TOKENS = 22
NUM_MOVES = 250
WEIGHTS = {
    "accept": 4,
    "follow": 2,
    "prefill": 8,
    "exchange": 8,
    "land": 10,
    "copy": 3,
    "beat": 6,
    "reuse": 4,
    "release": 1,
    "lose": 1,
    "fail": 1,
    "abort": 1,
    "close_stream": 1,
    "fail_read": 1,
    "reconnect": 1,
    "change_room": 1,
    "hang": 1,
}


class Request:
    """One request on both sides, and the bytes that its KV is."""

    def __init__(self, sequence: Sequence, ticket: KvTicket, data: Bytes) -> None:
        self.id = sequence.request.id
        self.prefill = sequence
        self.ticket = ticket
        self.data = data  # [layers, 2, heads, tokens, head_bytes], as prefill wrote it
        self.num_sealed = 0
        self.is_prefilling = True
        self.decode: Sequence | None = None
        self.is_reading = False


class Walk:
    """The method named like a move makes it; a Follow of request i is named i."""

    def __init__(self, seed: int, source_tokens: int, our_tokens: int) -> None:
        self.random = random.Random(seed)
        self.num_blocks = 96 // our_tokens
        self.pair = HandoffPair(
            self.num_blocks,
            limits=LIMITS,
            layout=replace(LAYOUT, block_tokens=our_tokens),
            source_layout=replace(LAYOUT, block_tokens=source_tokens),
            source_blocks=128 // source_tokens,
        )
        self.source = self.pair.side.source
        self.requests: dict[int, Request] = {}
        self.next_id = 1
        self.ends: Counter[str] = Counter()

    def run(self) -> None:
        for move in self.random.choices(list(WEIGHTS), list(WEIGHTS.values()), k=NUM_MOVES):
            getattr(self, move)()
            self.pair.pool.check_integrity()
            self.pair.side.pool.check_integrity()
            assert self.source.num_pinned <= self.pair.side.pool.num_in_use
            posted = [block for read in self.pair.fabric.pending for block in read.request.local_blocks]
            assert all(self.pair.pool.references(block) for block in posted), "a read writes to a free block"

    def pick(self) -> Request | None:
        return self.random.choice(list(self.requests.values())) if self.requests else None

    def pick_read(self) -> MemoryTransfer | None:
        return self.random.choice(self.pair.fabric.pending) if self.pair.fabric.pending else None

    # ---------------------------------------------------------------------------------------------- the good way

    def accept(self) -> None:
        side = self.pair.side
        needed = side.layout.blocks_for(MAX_TOKENS)
        if len(self.requests) >= 4 or side.pool.num_free < needed or not self.source.can_accept(needed):
            return
        is_shared = self.random.random() < 0.3
        base = 0 if is_shared else self.next_id * 100
        num_tokens = self.random.randint(1, MAX_TOKENS)
        sequence = make_sequence([base + token for token in range(num_tokens)], self.next_id, layout=side.layout)
        ticket = side.accept(sequence)
        if is_shared:  # equal tokens have equal KV
            for index, block in enumerate(sequence.blocks):
                side.memory.block_rows[block] = 10 + index
        data = glue(side.memory.block_rows[sequence.blocks].numpy(), side.layout, num_tokens)
        request = Request(sequence, ticket, data.copy())
        self.requests[request.id] = request
        self.next_id += 1

    def follow(self) -> None:
        for request in self.requests.values():
            if request.decode is None:
                request.decode = make_sequence(request.prefill.tokens, request.id, layout=self.pair.layout)
                request.is_reading = True
                self.pair.reader.open(request.decode, request.ticket)
            if request.is_reading:
                self.source.handle(FollowAttach(request.id, request.ticket))

    def prefill(self) -> None:
        request = self.pick()
        if request is None or not request.is_prefilling:
            return
        request.num_sealed += self.random.randint(1, 3)
        self.source.sealed(request.prefill, request.num_sealed)
        if request.num_sealed >= len(request.prefill.blocks):
            self.source.finished(request.prefill, first_tokens())
            self._end_prefill(request)

    def land(self) -> None:
        if transfer := self.pick_read():
            transfer.land()

    def copy(self) -> None:
        """A read during which everything that is free is reused."""
        if transfer := self.pick_read():
            transfer.copy_data()
            self.reuse()
            transfer.read_words()

    def exchange(self) -> None:
        """Messages of both sides arrive; both loops take a step."""
        for event in self.pair.side.take_events():
            match event:
                case FollowReady(follow, num_blocks):
                    self.pair.reader.handle(HandoffReady(follow, num_blocks))
                case FollowComplete(follow, tokens, partial):
                    self.pair.reader.handle(HandoffComplete(follow, tokens, partial))
                case FollowFailed(follow, error):
                    self.pair.reader.handle(HandoffFailed(follow, error))
                case _:
                    pass
        for outcome in self.pair.reader.poll():
            self.check(outcome)
        for release in self.pair.take_events():
            if isinstance(release, HandoffRelease):
                self.source.handle(FollowRelease(release.id, release.reason))
        self.source.tick()

    def beat(self) -> None:
        self.pair.clock.advance(0.5)
        for request in self.requests.values():
            if request.is_reading:
                self.source.handle(FollowBeat(request.id))

    # ---------------------------------------------------------------------------------------------- disturbances

    def reuse(self) -> None:
        """Other requests overwrite everything that is free, on both sides."""
        for pool, memory in ((self.pair.side.pool, self.pair.side.memory), (self.pair.pool, self.pair.memory)):
            blocks = pool.reserve(pool.num_free)
            if blocks:
                memory.block_rows[blocks] = 255
            pool.release(blocks)

    def release(self) -> None:
        if request := self.pick():
            self.source.handle(ReleaseTicket(1, request.ticket))

    def lose(self) -> None:
        if request := self.pick():
            self.source.handle(FollowLost(request.id))

    def fail(self) -> None:
        request = self.pick()
        if request is not None and request.is_prefilling:
            self.source.failed(request.id, RequestCancelledError("cancelled"))
            self._end_prefill(request)

    def abort(self) -> None:
        if request := self.pick():
            self.pair.reader.abort(request.id)
            self._end_reading(request)

    def close_stream(self) -> None:
        if request := self.pick():
            self.source.handle(PrefillStreamClosed(request.id))

    def fail_read(self) -> None:
        if transfer := self.pick_read():
            transfer.end(TransferState.FAILED, TransferError("lost"))

    def reconnect(self) -> None:
        self.pair.reader.handle(DisconnectPeer(ADDRESS))
        self.pair.reader.handle(ConnectPeer(self.pair.side.peer(self.pair.source_connector.offer())))

    def change_room(self) -> None:
        self.pair.room = self.random.choice([self.num_blocks, self.num_blocks, 2])

    def hang(self) -> None:
        self.pair.clock.advance(self.random.choice([1.5, 2.0, 3.5]))

    # ----------------------------------------------------------------------------------------------- what must hold

    def check(self, outcome: HandoffArrived | HandoffBroken) -> None:
        request = self.requests[outcome.request_id]
        decode = request.decode
        assert decode is not None and request.is_reading
        layout = self.pair.layout
        kv = glue(self.pair.memory.block_rows[decode.blocks].numpy(), layout, decode.num_computed)
        assert np.array_equal(kv, request.data[:, :, :, : decode.num_computed]), "KV that nobody wrote for these tokens"
        if isinstance(outcome, HandoffArrived):
            assert len(decode.blocks) == layout.blocks_for(len(decode.tokens))
            assert decode.num_computed == len(decode.tokens)
            self.ends["arrived"] += 1
        else:
            assert len(decode.blocks) == outcome.verified_blocks
            assert decode.num_computed == outcome.verified_tokens == layout.block_tokens * outcome.verified_blocks
            self.ends[type(outcome.error).__name__] += 1
        self.pair.pool.release(decode.blocks)
        self._end_reading(request)

    def wind_up(self) -> None:
        """Everybody leaves, time passes: every block of both pools is free."""
        pair = self.pair
        for request in list(self.requests.values()):
            pair.reader.abort(request.id)
            self._end_reading(request)
            if request.is_prefilling:
                self.source.failed(request.id, RequestCancelledError("cancelled"))
                self._end_prefill(request)
        self.exchange()
        pair.clock.advance(100.0)
        self.source.tick()
        assert pair.reader.poll() == []
        pair.assert_all_free()
        assert pair.side.pool.num_in_use == self.source.num_leases == self.source.num_pinned == 0

    def _end_prefill(self, request: Request) -> None:
        request.is_prefilling = False
        self.pair.side.pool.release(request.prefill.blocks)
        self._forget(request)

    def _end_reading(self, request: Request) -> None:
        request.is_reading = False
        request.decode = request.decode or request.prefill  # it is not opened any more
        self._forget(request)

    def _forget(self, request: Request) -> None:
        if not request.is_prefilling and request.decode is not None and not request.is_reading:
            self.requests.pop(request.id, None)


@pytest.mark.parametrize(("source_tokens", "our_tokens"), [(4, 4), (2, 8), (8, 2)])
def test_no_order_gives_wrong_kv_or_loses_a_block(source_tokens: int, our_tokens: int) -> None:
    ends: Counter[str] = Counter()
    for seed in range(NUM_WALKS):
        walk = Walk(seed, source_tokens, our_tokens)
        try:
            walk.run()
            walk.wind_up()
        except AssertionError as failure:
            failure.add_note(f"in the walk with seed {seed}")
            raise
        finally:
            walk.pair.close()
        ends += walk.ends
    # The walks are worth something: they met every end, and often enough the good one.
    assert ends["arrived"] >= NUM_WALKS
    for error in (StaleTicketError, TransferError, RequestCancelledError, LeaseExpiredError, OverloadedError):
        assert ends[error.__name__] >= 2, error
