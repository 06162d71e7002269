"""A source and a reader over the memory fabric; the test carries the messages that services would carry."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from handoff_sides import ADDRESS, LAYOUT, MODEL, SourceSide, make_memory, make_sequence
from split_kv import glue

from kvrelay_core.clock import ManualClock
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.handoff_reader import HandoffArrived, HandoffBroken, HandoffReader, ReaderLimits
from kvrelay_engine.messages import (
    ConnectPeer,
    Event,
    FollowAttach,
    FollowComplete,
    FollowFailed,
    FollowReady,
    HandoffComplete,
    HandoffFailed,
    HandoffReady,
    HandoffRelease,
    PeerConnected,
    ReleaseReason,
)
from kvrelay_engine.sequence import Sequence
from kvrelay_transfer.block_digest import BlockDigester
from kvrelay_transfer.connectors.base import Connector
from kvrelay_transfer.connectors.memory import MemoryConnector, MemoryFabric, MemoryTransfer
from kvrelay_transfer.layout import KvLayout
from kvrelay_transfer.ticket import KvTicket

FOLLOW = 11
TOKENS = list(range(100, 118))  # 18 tokens: four full blocks and half of one
ONE_BLOCK_READS = ReaderLimits(max_read_bytes=1, max_reads=8)


class HandoffPair:
    def __init__(
        self,
        num_blocks: int = 32,
        *,
        limits: ReaderLimits | None = None,
        connectors: Mapping[str, Connector] | None = None,
        is_connected: bool = True,
        layout: KvLayout = LAYOUT,
        source_layout: KvLayout = LAYOUT,
        source_blocks: int = 32,
        digest_share: float = 0.0,
    ) -> None:
        self.layout = layout
        self.clock = ManualClock()
        self.fabric = MemoryFabric()
        self.side = SourceSide(self.clock, source_blocks, layout=source_layout, digest_share=digest_share)
        self.source_connector = MemoryConnector(self.fabric, self.side.memory, self.clock)
        self.memory = make_memory(num_blocks, layout)
        self.pool = BlockPool(num_blocks, self.memory.words)
        self.events: list[Event] = []
        self.room = num_blocks
        self.reader = HandoffReader(
            self.pool,
            layout,
            connectors or {"memory": MemoryConnector(self.fabric, self.memory, self.clock)},
            self.clock,
            self.events.append,
            self.reserve,
            model_fingerprint=MODEL,
            limits=limits,
            digester=BlockDigester(self.memory),
        )
        if is_connected:
            self.connect()

    def close(self) -> None:
        self.side.close()
        self.memory.close()

    def reserve(self, sequence: Sequence, num_blocks: int) -> list[int] | None:
        """The scheduler's word: as long as `room` lasts."""
        if num_blocks > min(self.room, self.pool.num_free):
            return None
        return self.pool.reserve(num_blocks)

    def connect(self) -> None:
        self.reader.handle(ConnectPeer(self.side.peer(self.source_connector.offer())))
        self.reader.poll()
        assert self.take_events() == [PeerConnected(ADDRESS, "memory", 0.0)]

    def take_events(self) -> list[Event]:
        taken = list(self.events)
        self.events.clear()
        return taken

    def poll(self) -> HandoffArrived | HandoffBroken | None:
        """One step of a reader with one hand-off."""
        outcomes = self.reader.poll()
        assert len(outcomes) <= 1
        return outcomes[0] if outcomes else None

    def land(self) -> HandoffArrived | HandoffBroken | None:
        """Everything that is posted lands, again and again, until nothing more is posted."""
        outcome = self.poll()
        while outcome is None and self.fabric.pending:
            self.fabric.land_all()
            outcome = self.poll()
        return outcome

    def open(self, sequence: Sequence, ticket: KvTicket) -> Sequence:
        """The decode's own sequence of the same tokens; the ticket is followed."""
        num_choices = len(sequence.request.generation.choices)
        decode = make_sequence(sequence.tokens, sequence.request.id, num_choices, self.layout)
        self.reader.open(decode, ticket)
        self.side.source.handle(FollowAttach(FOLLOW, ticket))
        return decode

    def carry(self, request_id: int = 1) -> None:
        """What the source emitted for the Follow reaches the reader."""
        for event in self.side.take_events():
            match event:
                case FollowReady(_, num_blocks, digests):
                    self.reader.handle(HandoffReady(request_id, num_blocks, digests))
                case FollowComplete(_, first_tokens, partial):
                    self.reader.handle(HandoffComplete(request_id, first_tokens, partial))
                case FollowFailed(_, error):
                    self.reader.handle(HandoffFailed(request_id, error))
                case _:
                    pass

    def released(self, request_id: int = 1) -> ReleaseReason:
        """The reason with which the reader left the Follow, once."""
        (release,) = [event for event in self.take_events() if isinstance(event, HandoffRelease)]
        assert release.id == request_id
        return release.reason

    def only_transfer(self) -> MemoryTransfer:
        (transfer,) = self.fabric.pending
        return transfer

    def holds_kv_of(self, sequence: Sequence, source_blocks: list[int] | tuple[int, ...]) -> bool:
        """As many tokens as `sequence` has computed."""
        ours = glue(self.memory.block_rows[sequence.blocks].numpy(), self.layout, sequence.num_computed)
        rows = self.side.memory.block_rows[list(source_blocks)].numpy()
        return np.array_equal(ours, glue(rows, self.side.layout, sequence.num_computed))

    def assert_all_free(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_in_use == self.reader.num_transfers == self.reader.num_quarantined == 0
        assert not self.reader.is_busy


def finished(pair: HandoffPair, tokens: list[int] = TOKENS) -> tuple[Sequence, KvTicket]:
    """A prefill that is over, followed by the reader, whose messages have arrived."""
    sequence = make_sequence(tokens, layout=pair.side.layout)
    ticket = pair.side.prefill(sequence)
    decode = pair.open(sequence, ticket)
    pair.carry()
    return decode, ticket


def broken(pair: HandoffPair) -> HandoffBroken:
    outcome = pair.land()
    assert isinstance(outcome, HandoffBroken)
    return outcome
