"""A connector whose reads fail on their way is left for the next one, and tried again later."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from handoff_sides import ADDRESS
from two_ways import TwoWays, fail

from kvrelay_core.clock import ManualClock
from kvrelay_core.errors import (
    DeadlineError,
    InternalError,
    LeaseExpiredError,
    StaleTicketError,
    TransferError,
    WorkerLostError,
)
from kvrelay_engine.handoff_peers import LEFT_OPEN_S
from kvrelay_engine.handoff_reader import HandoffArrived, HandoffBroken
from kvrelay_engine.link_health import (
    FIRST_REST_S,
    LONGEST_REST_S,
    LinkHealth,
    is_fault_of_the_way,
    is_worth_another_try,
)
from kvrelay_transfer.connectors.base import TransferState


@pytest.fixture
def ways() -> Iterator[TwoWays]:
    ways = TwoWays()
    yield ways
    ways.close()


def test_two_failures_in_a_row_and_the_next_connector_carries_the_pair(ways: TwoWays) -> None:
    assert ways.way == "first"
    fail(ways, 1)
    assert ways.way == "first" and ways.reader.peers.fallbacks == 0
    fail(ways, 1)
    assert ways.way == "second"
    assert (ways.reader.peers.fallbacks, ways.reader.peers.failed_reads) == (1, 2)


def test_the_load_says_which_connector_was_left(ways: TwoWays) -> None:
    fail(ways, 2)
    ways.begin()
    assert isinstance(ways.land(), HandoffArrived)
    first, second = ways.reader.peers.load()
    assert (first.connector, first.is_current, first.counts.fallbacks, first.counts.reads) == ("first", False, 1, 0)
    assert (second.connector, second.is_current, second.counts.fallbacks, second.counts.reads) == ("second", True, 0, 1)
    assert [total.counts for total in ways.reader.peers.records.totals()] == [first.counts, second.counts]
    ways.reader.peers.disconnect(ADDRESS)
    assert ways.reader.peers.load() == ()
    assert [total.counts.reads for total in ways.reader.peers.records.totals()] == [0, 1], "totals outlive the peer"


def test_a_success_between_forgets_the_failure(ways: TwoWays) -> None:
    for _ in range(5):
        fail(ways, 1)
        ways.reader.peers.note_read(ADDRESS, "first", None)
    assert ways.way == "first"


def test_with_no_other_way_the_link_stays(ways: TwoWays) -> None:
    fail(ways, 2)
    fail(ways, 2)
    assert ways.way == "second" and ways.reader.peers.fallbacks == 1


def test_the_better_one_is_tried_again_after_its_rest(ways: TwoWays) -> None:
    fail(ways, 2)
    ways.clock.advance(FIRST_REST_S - 1)
    assert ways.way == "second"
    ways.clock.advance(2)
    assert ways.way == "first"
    fail(ways, 1)
    assert ways.way == "second", "one failure is enough now"
    ways.clock.advance(FIRST_REST_S + 1)
    assert ways.way == "second", "and the rest is longer"
    ways.clock.advance(FIRST_REST_S)
    assert ways.way == "first"


def test_rests_grow_to_a_bound() -> None:
    clock = ManualClock()
    health = LinkHealth(clock)
    rest_s = FIRST_REST_S
    for _ in range(8):
        while not health.note_failure("peer", "shm"):
            pass
        clock.advance(rest_s - 0.1)
        assert health.rests("peer", "shm") and not health.has_rested("peer", "shm")
        clock.advance(0.2)
        assert not health.rests("peer", "shm") and health.has_rested("peer", "shm")
        health.try_again("peer", "shm")
        rest_s = min(LONGEST_REST_S, 2 * rest_s)
    assert not health.rests("peer", "grpc") and not health.rests("other", "shm")
    health.note_failure("peer", "shm")
    health.forget("peer")
    assert not health.rests("peer", "shm")


def test_a_read_that_ends_well_after_its_link_was_left_does_not_end_the_rest(ways: TwoWays) -> None:
    fail(ways, 2)
    ways.reader.peers.note_read(ADDRESS, "first", None)
    assert ways.way == "second"
    ways.clock.advance(FIRST_REST_S + 1)
    assert ways.way == "first"


def test_the_other_reads_of_one_incident_do_not_lengthen_the_rest(ways: TwoWays) -> None:
    for _ in range(8):
        ways.reader.peers.note_read(ADDRESS, "first", TransferError("it broke"))
    assert ways.way == "second"
    ways.clock.advance(FIRST_REST_S + 1)
    assert ways.way == "first"


def test_one_that_does_not_connect_after_its_rest_is_tried_again_later(
    ways: TwoWays, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise TransferError("no socket")

    fail(ways, 2)
    with monkeypatch.context() as patched:
        patched.setattr(ways.reader.peers._connectors["first"], "connect", refuse)
        ways.clock.advance(FIRST_REST_S + 1)
        assert ways.way == "second"
    assert ways.way == "second", "it rests again, and twice as long"
    ways.clock.advance(2 * FIRST_REST_S + 1)
    assert ways.way == "first"


def test_a_failed_read_that_cannot_be_stopped_counts_too(ways: TwoWays) -> None:
    fail(ways, 1)
    ways.begin()
    (transfer,) = ways.fabric.pending
    transfer.error = DeadlineError("too late, and it may still land")
    assert isinstance(ways.poll(), HandoffBroken)
    assert transfer.poll() is TransferState.PENDING and ways.reader.num_quarantined > 0
    assert (ways.way, ways.reader.peers.failed_reads) == ("second", 2)


def test_a_failed_read_is_posted_once_more_and_the_handoff_arrives(ways: TwoWays) -> None:
    ways.begin()
    ways.fail_reads(TransferError("the line broke"))
    assert isinstance(ways.land(), HandoffArrived)
    assert ways.reader.peers.failed_reads == 1


def test_a_dead_way_costs_two_tries_and_not_the_handoff(ways: TwoWays) -> None:
    ways.begin()
    ways.fail_reads(TransferError("the line is dead"))
    assert ways.poll() is None and ways.way == "first"
    ways.fail_reads(TransferError("the line is dead"))
    assert ways.poll() is None and ways.way == "second"
    assert isinstance(ways.land(), HandoffArrived)


def test_a_link_that_was_left_is_closed_when_its_last_read_has_ended(ways: TwoWays) -> None:
    left = ways.reader.peers.find(ADDRESS, ways.side.memory.engine_epoch)
    assert left is not None
    ways.begin()
    fail(ways, 2)
    ways.poll()
    assert ways.way == "second" and not left.is_closed
    assert isinstance(ways.land(), HandoffArrived), "what was posted before is still good"
    ways.poll()
    assert left.is_closed and not ways.reader.peers._left


def test_a_read_that_does_not_end_keeps_its_link_open_for_a_minute(ways: TwoWays) -> None:
    ways.begin()
    ways.reader.abort(1)
    fail(ways, 2)
    (transfer,) = ways.fabric.pending
    transfer._deadline_at_s = 2 * LEFT_OPEN_S
    ways.clock.advance(LEFT_OPEN_S - 1)
    ways.reader.poll()
    assert ways.reader.num_quarantined
    ways.clock.advance(2)
    ways.reader.poll()
    assert transfer.poll() is TransferState.TORN_DOWN and ways.reader.peers.fallbacks == 1


def test_a_read_that_fails_over_every_way_breaks_the_handoff(ways: TwoWays) -> None:
    ways.begin()
    for _ in range(2):
        ways.fail_reads(TransferError("the line is dead"))
        assert ways.poll() is None
    ways.fail_reads(TransferError("the other line as well"))
    broken = ways.poll()
    assert isinstance(broken, HandoffBroken) and broken.error.message == "the other line as well"


def test_what_the_source_says_is_no_fault_of_the_way(ways: TwoWays) -> None:
    ways.begin()
    ways.fail_reads(LeaseExpiredError("the lease has ended"))
    broken = ways.poll()
    assert isinstance(broken, HandoffBroken) and ways.reader.peers.failed_reads == 0
    assert not any(
        map(is_fault_of_the_way, (StaleTicketError("x"), LeaseExpiredError("x"), WorkerLostError("x"), None))
    )
    assert is_fault_of_the_way(DeadlineError("x")) and not is_worth_another_try(DeadlineError("x"))


def test_a_read_that_the_connector_lost_counts_and_is_posted_once_more(ways: TwoWays) -> None:
    ways.begin()
    (transfer,) = ways.fabric.pending
    transfer.end(TransferState.TORN_DOWN, TransferError("the endpoint was reset"))
    assert isinstance(ways.land(), HandoffArrived)
    assert (ways.way, ways.reader.peers.failed_reads) == ("first", 1)


def test_a_connector_whose_thread_is_gone_is_left_too(ways: TwoWays) -> None:
    for request_id in (1, 2):
        assert ways.way == "first"
        ways.begin(request_id)
        (transfer,) = ways.fabric.pending
        transfer.end(TransferState.TORN_DOWN, InternalError("its thread is gone"))
        assert isinstance(ways.poll(), HandoffBroken), "a bug is not tried again"
    assert ways.way == "second"


def test_a_read_closed_with_its_link_says_nothing_about_the_way(ways: TwoWays) -> None:
    fail(ways, 1)
    ways.begin()
    ways.reader.peers.disconnect(ADDRESS)
    assert isinstance(ways.poll(), HandoffBroken)
    assert ways.reader.peers.failed_reads == 1
    ways.connect_again()
    assert ways.way == "first"


def test_a_link_that_is_torn_down_for_its_hung_reads_counts_against_its_connector(ways: TwoWays) -> None:
    fail(ways, 1)
    ways.reader.peers.tear_down(ADDRESS, "first")
    ways.connect_again()
    assert ways.way == "second"


# ------------------------------------------------------------------------------------------ across reconnects


def test_a_reconnect_of_the_same_peer_forgets_neither_failures_nor_rests(ways: TwoWays) -> None:
    fail(ways, 1)
    ways.reader.peers.disconnect(ADDRESS)
    ways.connect_again()
    fail(ways, 1)
    assert ways.way == "second"
    ways.reader.peers.disconnect(ADDRESS)
    assert ways.reader.peers.load() == (), "of a peer that is away nothing is said"
    ways.connect_again()
    assert ways.way == "second"
    assert [link.counts.fallbacks for link in ways.reader.peers.load()] == [1, 0]
    ways.clock.advance(FIRST_REST_S + 1)
    assert ways.way == "first"


def test_a_rest_that_ends_while_the_peer_is_away_leaves_one_try(ways: TwoWays) -> None:
    fail(ways, 2)
    ways.reader.peers.disconnect(ADDRESS)
    ways.clock.advance(FIRST_REST_S + 1)
    ways.connect_again()
    assert ways.way == "first"
    fail(ways, 1)
    assert ways.way == "second"


def test_a_new_start_of_the_peer_begins_anew(ways: TwoWays) -> None:
    fail(ways, 2)
    ways.restart_source()
    assert ways.way == "first"
    assert [link.counts.fallbacks for link in ways.reader.peers.load()] == [0]


def test_a_peer_that_is_away_for_long_is_forgotten(ways: TwoWays) -> None:
    peers = ways.reader.peers
    fail(ways, 2)
    peers.disconnect(ADDRESS)
    ways.clock.advance(LONGEST_REST_S - 1)
    peers.poll()
    assert peers._epochs and peers.records._records and peers._health._records
    ways.clock.advance(2)
    peers.poll()
    assert not (peers._epochs or peers._gone_at_s or peers.records._records or peers._health._records)


def test_a_connector_that_rests_is_better_than_none(ways: TwoWays) -> None:
    fail(ways, 2)
    ways.reader.peers.disconnect(ADDRESS)
    del ways.mine["second"]
    ways.connect_again()
    assert ways.way == "first"
