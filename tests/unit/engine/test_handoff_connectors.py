"""Whole hand-offs over each connector, and each way in which a ticket or its blocks can be bad.

Every bad case ends in its typed error, and nothing of it becomes visible: no blocks for the request, nothing in
the prefix cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from handoff_pair import FOLLOW
from handoff_sides import LAYOUT, MODEL, SourceSide, make_memory, make_sequence, wait_until
from msgspec.structs import replace

from kvrelay_core.clock import ManualClock
from kvrelay_core.errors import (
    KvRelayError,
    LeaseExpiredError,
    MismatchError,
    StaleTicketError,
    TicketRejectedError,
    TransferError,
)
from kvrelay_engine.block_pool import BlockPool
from kvrelay_engine.handoff_fetches import EmittedFetches
from kvrelay_engine.handoff_reader import HandoffArrived, HandoffBroken, HandoffReader, ReaderLimits
from kvrelay_engine.messages import (
    ConnectPeer,
    Event,
    Export,
    Exported,
    Fetch,
    FetchAbort,
    FetchedPiece,
    FetchEnded,
    FollowAttach,
    FollowComplete,
    FollowFailed,
    FollowReady,
    HandoffComplete,
    HandoffFailed,
    HandoffReady,
    PeerConnected,
    PrefillStreamClosed,
    SlotFree,
)
from kvrelay_engine.sequence import Sequence
from kvrelay_transfer.connectors.base import Connector, ConnectorOffer
from kvrelay_transfer.connectors.copy_thread import copy_span
from kvrelay_transfer.connectors.registry import create_connectors
from kvrelay_transfer.connectors.shm import ShmConnector
from kvrelay_transfer.staging import BlockStaging, slot_bytes_for
from kvrelay_transfer.staging_slots import StagingSlots
from kvrelay_transfer.ticket import KvTicket, TicketSigner

TOKENS = list(range(100, 146))  # 46 tokens: eleven full blocks and half of one
BLOCKS_PER_PIECE = 3


class TwoEngines:
    """A prefill and a decode engine's hand-off parts over one real connector; `run` plays both services."""

    def __init__(self, connector: str, directory: Path) -> None:
        self.clock = ManualClock()
        self.side = SourceSide(self.clock)
        self.memory = make_memory(32)
        self.pool = BlockPool(32, self.memory.words)
        self.events: list[Event] = []
        self.slots = StagingSlots.create(2, slot_bytes_for(LAYOUT))
        self.staging = BlockStaging(self.memory, self.slots)
        self.free_slots = [0, 1]
        self.connectors: dict[str, Connector] = create_connectors(
            [connector],
            memory=self.memory,
            run_dir=directory,
            worker_id="decode-0",
            staging=self.staging,
            socket_half=EmittedFetches(self.events.append),
            clock=self.clock,
        )
        self.source_shm = ShmConnector(self.side.memory, self.clock, directory / "prefill-0.sock")
        self.reader = HandoffReader(
            self.pool,
            LAYOUT,
            self.connectors,
            self.clock,
            self.events.append,
            lambda _, num_blocks: self.pool.reserve(num_blocks),
            model_fingerprint=MODEL,
            limits=ReaderLimits(max_read_bytes=5 * LAYOUT.block_bytes, max_quarantined_share=0.5),
        )
        self.aborted: list[int] = []
        shm_offer = self.source_shm.offer()
        assert shm_offer is not None
        self.reader.handle(ConnectPeer(self.side.peer(shm_offer, ConnectorOffer("grpc", b""))))
        wait_until(self._is_connected)

    def _is_connected(self) -> bool:
        """The link's probe is over, so that the copies from now on are those of reads."""
        self.reader.poll()
        return any(isinstance(event, PeerConnected) for event in self.events)

    def open(self, tokens: list[int], ticket: KvTicket) -> Sequence:
        decode = make_sequence(tokens)
        self.reader.open(decode, ticket)
        self.side.source.handle(FollowAttach(FOLLOW, ticket))
        return decode

    def run(self) -> HandoffArrived | HandoffBroken:
        outcomes: list[HandoffArrived | HandoffBroken] = []

        def turn() -> bool:
            self._carry_follow()
            self._carry_fetches()
            outcomes.extend(self.reader.poll())
            return bool(outcomes)

        wait_until(turn)
        self._carry_fetches()
        return outcomes[0]

    def _carry_follow(self) -> None:
        for event in self.side.take_events():
            match event:
                case FollowReady(_, num_blocks):
                    self.reader.handle(HandoffReady(1, num_blocks))
                case FollowComplete(_, first_tokens, partial):
                    self.reader.handle(HandoffComplete(1, first_tokens, partial))
                case FollowFailed(_, error):
                    self.reader.handle(HandoffFailed(1, error))
                case _:
                    pass

    def _carry_fetches(self) -> None:
        taken = list(self.events)
        self.events.clear()
        for event in taken:
            match event:
                case Fetch():
                    self._fetch(event)
                case SlotFree(slot):
                    self.free_slots.append(slot)
                case FetchAbort(read):
                    self.aborted.append(read)
                case _:
                    pass

    def _fetch(self, fetch: Fetch) -> None:
        for first in range(0, len(fetch.blocks), BLOCKS_PER_PIECE):
            blocks = fetch.blocks[first : first + BLOCKS_PER_PIECE]
            self.side.source.handle(Export(1, fetch.ticket, fetch.group, blocks, 0))
            exported = self.side.events.pop()
            assert isinstance(exported, Exported)
            if exported.error is not None:
                self.reader.handle(FetchEnded(fetch.read, exported.error))
                return
            slot = self.free_slots.pop()
            with self.side.slots.slot(0) as sent, self.slots.slot(slot) as received:
                received[:] = sent
            self.reader.handle(FetchedPiece(fetch.read, first, slot, exported.words))
            self._carry_fetches()
        self.reader.handle(FetchEnded(fetch.read))

    def close(self) -> None:
        self.reader.close()
        for connector in self.connectors.values():
            connector.close()
        self.source_shm.close()
        self.reader.poll()
        self._carry_fetches()
        assert sorted(self.free_slots) == [0, 1]
        self.staging.close()
        self.slots.close()
        self.side.close()
        self.memory.close()


@pytest.fixture(params=["shm", "grpc"])
def engines(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TwoEngines]:
    engines = TwoEngines(request.param, tmp_path)
    yield engines
    engines.close()
    assert list(tmp_path.iterdir()) == []


def expect_nothing_visible(engines: TwoEngines, decode: Sequence, error: type[KvRelayError]) -> None:
    outcome = engines.run()
    assert isinstance(outcome, HandoffBroken)
    assert type(outcome.error) is error, outcome.error
    assert outcome.verified_blocks == 0 and decode.blocks == []
    wait_until(lambda: engines.reader.poll() == [] and not engines.reader.num_quarantined)
    assert engines.pool.num_cached == engines.pool.num_in_use == 0
    engines.pool.check_integrity()


@pytest.mark.parametrize("num_tokens", [1, 4, 20, 46])
def test_a_hand_off_arrives_bit_equal(engines: TwoEngines, num_tokens: int) -> None:
    sequence = make_sequence(TOKENS[:num_tokens])
    ticket = engines.side.prefill(sequence)
    decode = engines.open(TOKENS[:num_tokens], ticket)
    outcome = engines.run()
    assert isinstance(outcome, HandoffArrived)
    assert outcome.timing.connector in engines.connectors
    source_rows = engines.side.memory.block_rows[list(ticket.groups[0].blocks)]
    assert torch.equal(engines.memory.block_rows[decode.blocks], source_rows)


def test_a_block_reused_before_the_read(engines: TwoEngines) -> None:
    ticket = engines.side.prefill(make_sequence(TOKENS))
    decode = engines.open(TOKENS, ticket)
    for block in ticket.groups[0].blocks:
        engines.side.overwrite(block)
    expect_nothing_visible(engines, decode, StaleTicketError)
    assert engines.reader.stale_reads >= 1


def test_a_block_reused_during_the_read(engines: TwoEngines, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = engines.side.prefill(make_sequence(TOKENS))
    decode = engines.open(TOKENS, ticket)
    first = ticket.groups[0].blocks[0]
    copy_out = engines.side.staging.copy_out

    def copy_and_reuse(blocks: tuple[int, ...], slot: int) -> None:
        copy_out(blocks, slot)
        engines.side.overwrite(first)

    monkeypatch.setattr(engines.side.staging, "copy_out", copy_and_reuse)
    if "shm" in engines.connectors:

        def copy_span_and_reuse(*args: object) -> bool:
            is_whole = copy_span(*args)  # type: ignore[arg-type]
            engines.side.overwrite(first)
            return is_whole

        monkeypatch.setattr("kvrelay_transfer.connectors.shm.copy_span", copy_span_and_reuse)
    expect_nothing_visible(engines, decode, StaleTicketError)


def test_a_lease_that_expired_before_the_follow(engines: TwoEngines) -> None:
    ticket = engines.side.prefill(make_sequence(TOKENS))
    engines.clock.advance(30.0)
    engines.side.source.tick()
    decode = engines.open(TOKENS, ticket)
    expect_nothing_visible(engines, decode, LeaseExpiredError)


def test_a_lease_that_ends_before_the_read(engines: TwoEngines) -> None:
    """The Follow's news is still on its way: what is read is judged by the words, or refused at the source."""
    ticket = engines.side.prefill(make_sequence(TOKENS))
    decode = make_sequence(TOKENS)
    engines.reader.open(decode, ticket)
    engines.reader.handle(HandoffReady(1, (11,)))
    engines.side.source.handle(PrefillStreamClosed(1))
    engines.side.pool.release(engines.side.pool.reserve(engines.side.pool.num_free))
    engines.side.take_events()
    error = StaleTicketError if "shm" in engines.connectors else LeaseExpiredError
    expect_nothing_visible(engines, decode, error)


def forged(ticket: KvTicket) -> KvTicket:
    return TicketSigner(b"guess".ljust(32), ticket.engine_epoch).sign(ticket)


def altered(ticket: KvTicket) -> KvTicket:
    group = replace(ticket.groups[0], blocks=tuple(reversed(ticket.groups[0].blocks)))
    return replace(ticket, groups=(group,))


@pytest.mark.parametrize("spoil", [forged, altered])
def test_a_ticket_that_the_source_did_not_sign(engines: TwoEngines, spoil: Callable[[KvTicket], KvTicket]) -> None:
    ticket = spoil(engines.side.prefill(make_sequence(TOKENS)))
    decode = engines.open(TOKENS, ticket)
    expect_nothing_visible(engines, decode, TicketRejectedError)


def test_a_ticket_of_another_start(engines: TwoEngines) -> None:
    ticket = replace(engines.side.prefill(make_sequence(TOKENS)), engine_epoch=b"another epoch...")
    decode = engines.open(TOKENS, ticket)
    expect_nothing_visible(engines, decode, TicketRejectedError)


def test_a_ticket_of_another_start_that_nobody_followed_is_not_read(engines: TwoEngines) -> None:
    ticket = replace(engines.side.prefill(make_sequence(TOKENS)), engine_epoch=b"another epoch...")
    decode = make_sequence(TOKENS)
    engines.reader.open(decode, ticket)
    engines.reader.handle(HandoffReady(1, (11,)))
    engines.reader.poll()
    engines.clock.advance(5.0)
    expect_nothing_visible(engines, decode, TransferError)


def test_a_ticket_for_another_layout(engines: TwoEngines) -> None:
    ticket = engines.side.prefill(make_sequence(TOKENS))
    with pytest.raises(MismatchError, match="dtype"):
        engines.open(TOKENS, replace(ticket, layout=replace(LAYOUT, dtype="bfloat16")))
    assert engines.reader.poll() == [] and engines.pool.num_in_use == 0


def test_an_abort_in_the_middle_leaves_nothing_behind(engines: TwoEngines) -> None:
    ticket = engines.side.prefill(make_sequence(TOKENS))
    engines.open(TOKENS, ticket)
    engines._carry_follow()
    engines.reader.poll()
    assert engines.reader.num_transfers == 3
    engines.reader.abort(1)
    wait_until(lambda: engines.reader.poll() == [] and not engines.reader.num_quarantined)
    engines._carry_fetches()
    assert engines.aborted == ([] if "shm" in engines.connectors else [1, 2, 3])
    assert engines.pool.num_in_use == 0
    engines.pool.check_integrity()
