"""What is counted of reads over a link, how its speed is judged, and what a stale or torn down read counts as."""

from __future__ import annotations

import logging

import pytest
from handoff_pair import ONE_BLOCK_READS, HandoffPair, broken, finished
from handoff_sides import ADDRESS

from kvrelay_core.clock import ManualClock
from kvrelay_core.errors import LeaseExpiredError, TransferError
from kvrelay_engine.handoff_reader import HandoffArrived
from kvrelay_engine.link_records import ENOUGH_BYTES, LinkRecord, LinkRecords
from kvrelay_engine.load_messages import ReadCounts
from kvrelay_engine.messages import DisconnectPeer
from kvrelay_engine.transfer_stats import TransferStats
from kvrelay_transfer.connectors.base import LinkSpeed, TransferState
from kvrelay_transfer.connectors.link_floors import FLOORS, floor_of
from kvrelay_transfer.connectors.registry import preferred


@pytest.fixture
def pair() -> HandoffPair:
    return HandoffPair()


def counts_of(pair: HandoffPair) -> ReadCounts:
    (link,) = pair.reader.peers.load()
    assert (link.peer_id, link.connector, link.is_current) == (ADDRESS, "memory", True)
    return link.counts


def test_a_hand_off_is_counted(pair: HandoffPair) -> None:
    finished(pair)
    pair.poll()
    pair.clock.advance(0.25)
    assert isinstance(pair.land(), HandoffArrived)
    counts = counts_of(pair)
    assert (counts.reads, counts.size_bytes) == (1, 5 * pair.layout.block_bytes)
    assert (counts.reading_s, counts.mean_read_s) == (0.25, 0.25)
    assert 1 <= counts.spans <= 5
    assert (counts.failed_reads, counts.stale_reads, counts.fallbacks) == (0, 0, 0)


def test_reads_at_the_same_time_count_their_time_once() -> None:
    pair = HandoffPair(limits=ONE_BLOCK_READS)
    finished(pair)
    pair.poll()
    assert len(pair.fabric.pending) == 5
    pair.clock.advance(0.5)
    pair.fabric.pending[0].land()
    pair.poll()
    pair.clock.advance(0.5)
    assert isinstance(pair.land(), HandoffArrived)
    counts = counts_of(pair)
    assert (counts.reads, counts.spans, counts.reading_s) == (5, 5, 1.0)
    assert counts.mean_read_s == pytest.approx((0.5 + 4 * 1.0) / 5)


def test_what_fails_on_its_way_is_a_failed_read_and_a_refusal_is_none(pair: HandoffPair) -> None:
    finished(pair)
    pair.poll()
    pair.only_transfer().end(TransferState.FAILED, TransferError("the line broke"))
    pair.poll()
    pair.only_transfer().end(TransferState.FAILED, LeaseExpiredError("the lease has ended"))
    broken(pair)
    counts = counts_of(pair)
    assert (counts.reads, counts.failed_reads, counts.size_bytes) == (0, 1, 0)


def test_a_read_that_is_given_up_counts_neither_way_and_its_time_ends(pair: HandoffPair) -> None:
    finished(pair)
    pair.poll()
    pair.reader.abort(1)
    pair.clock.advance(2.0)
    pair.fabric.land_all()
    pair.reader.poll()
    pair.clock.advance(5.0)
    assert counts_of(pair) == ReadCounts(reading_s=2.0)
    pair.assert_all_free()


def test_a_read_that_the_connector_lost_is_a_failed_one(pair: HandoffPair) -> None:
    finished(pair)
    pair.poll()
    pair.only_transfer().end(TransferState.TORN_DOWN, TransferError("the endpoint was reset"))
    pair.poll()
    assert counts_of(pair).failed_reads == 1


def test_a_record_goes_on_when_the_same_peer_comes_back(pair: HandoffPair) -> None:
    finished(pair)
    assert isinstance(pair.land(), HandoffArrived)
    before = counts_of(pair)
    pair.reader.handle(DisconnectPeer(ADDRESS))
    pair.take_events()
    pair.connect()
    assert counts_of(pair) == before and before.reads == 1


def test_a_stale_read_is_one_that_came(pair: HandoffPair) -> None:
    _, ticket = finished(pair)
    pair.side.overwrite(ticket.groups[0].blocks[1])
    broken(pair)
    counts = counts_of(pair)
    assert (counts.reads, counts.stale_reads, counts.failed_reads) == (1, 1, 0)


def test_a_read_torn_down_with_its_peer_is_no_failure(pair: HandoffPair) -> None:
    finished(pair)
    pair.poll()
    pair.reader.handle(DisconnectPeer(ADDRESS))
    broken(pair)
    peers = pair.reader.peers
    assert peers.load() == ()
    peers.records.note_stale(ADDRESS, "memory")
    assert peers.load() == (), "of a peer that has gone nothing is said"
    (total,) = peers.records.totals()
    assert (total.counts.failed_reads, total.counts.stale_reads) == (0, 1)


# ---------------------------------------------------------------------------------------------------- floors


def make_record(connector: str = "shm", device: str = "cpu") -> LinkRecord:
    return LinkRecords(ManualClock(), device).find("10.0.0.7:1", connector)


def read_over(record: LinkRecord, size_bytes: int, seconds: float) -> None:
    clock = record.counts._clock
    assert isinstance(clock, ManualClock)
    record.counts.begin()
    clock.advance(seconds)
    record.counts.end()
    record.counts.succeed(size_bytes, 1, seconds)


def test_a_slow_link_rings_once_and_says_what_to_look_for(caplog: pytest.LogCaptureFixture) -> None:
    record = make_record()
    with caplog.at_level(logging.WARNING):
        record.judge(None)
        assert not record.is_judged
        record.judge(LinkSpeed(0.3, 2e-5))
        record.judge(LinkSpeed(0.3, 2e-5))
    (warning,) = caplog.messages
    assert warning.startswith("shm from 10.0.0.7:1 moves 0.30 GB/s, where 1 would be little; look for: ")
    load = record.load(is_current=True)
    assert (load.is_below_floor, load.floor_gb_per_s, load.probed_latency_s) == (True, 1.0, 2e-5)


def test_a_link_at_its_floor_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    record = make_record()
    record.judge(LinkSpeed(1.0))
    assert record.is_judged and not record.is_below_floor and not caplog.messages


@pytest.mark.parametrize(("seconds", "is_slow"), [(1.0, True), (0.1, False)])
def test_without_a_probe_the_first_reads_are_judged(seconds: float, is_slow: bool) -> None:
    record = make_record("grpc")
    record.judge(LinkSpeed())
    read_over(record, ENOUGH_BYTES - 1, 0.0)
    record.judge(LinkSpeed())
    assert not record.is_judged, "too little was read to tell"
    read_over(record, 1, seconds)
    record.judge(LinkSpeed())
    assert (record.is_judged, record.is_below_floor) == (True, is_slow)


def test_what_auto_takes_has_a_floor_with_advice() -> None:
    for device in ("cpu", "cuda"):
        for connector in (*preferred(device), "nixl", "ucx"):
            assert floor_of(connector, device).gb_per_s > 0 and floor_of(connector, device).look_for
    assert floor_of("memory", "cpu").gb_per_s == 0.0
    assert {device for _, device in FLOORS} == {"cpu", "cuda"}


def test_a_link_that_read_nothing_has_no_speed() -> None:
    assert TransferStats(ManualClock()).gb_per_s == 0.0
