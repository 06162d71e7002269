"""Reads that were given up and hang cost their own link, and no other one to the same peer (PROTOCOL A5)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from handoff_sides import ADDRESS
from two_ways import TwoWays, fail

from kvrelay_engine.handoff_reader import HandoffArrived
from kvrelay_engine.messages import PeerFailed


@pytest.fixture
def ways() -> Iterator[TwoWays]:
    ways = TwoWays()
    yield ways
    ways.close()


def test_hung_reads_of_a_connector_that_was_left_cost_the_next_one_nothing(ways: TwoWays) -> None:
    """More of the pool than a link may have in quarantine."""
    hang_on_first(ways, [1, 2])
    fail(ways, 2)
    ways.take_events()
    for request_id in (1, 2):
        ways.reader.abort(request_id)
    assert ways.way == "second"
    assert not [event for event in ways.take_events() if isinstance(event, PeerFailed)]
    arrive(ways, 3)
    ways.fabric.land_all()  # what was given up, at last
    ways.poll()
    assert ways.reader.num_quarantined == 0


def test_while_a_torn_link_has_not_ended_the_peer_is_read_over_the_next_connector(ways: TwoWays) -> None:
    """As with NIXL, which cannot stop a read."""
    hang_on_first(ways, [1, 2])
    fail(ways, 1)  # the second one comes with the tearing down
    for request_id in (1, 2):
        ways.reader.abort(request_id)
    assert ways.reader.num_quarantined > 0
    assert ways.way == "first"  # what hangs fills the cap at most
    ways.begin(4)  # a single block comes through, and hangs too
    ways.reader.abort(4)
    ways.connect_again()
    assert ways.way == "second"
    ways.poll()
    assert ways.way == "second"
    arrive(ways, 3)


def test_a_link_is_closed_once_however_often_it_is_to_be_torn_down(ways: TwoWays) -> None:
    closed = hang_on_first(ways, [1])
    fail(ways, 2)
    for _ in range(3):
        ways.reader.peers.tear_down(ADDRESS, "first")
    ways.reader.peers.disconnect(ADDRESS)
    assert closed == ["first"]


def hang_on_first(ways: TwoWays, request_ids: list[int]) -> list[str]:
    """Reads that end when the fabric says so, whoever closes their link. Returns what will have been closed."""
    closed: list[str] = []
    for request_id in request_ids:
        ways.begin(request_id)
    active = ways.reader.peers.find(ADDRESS, ways.side.memory.engine_epoch)
    assert active is not None and active.connector == "first"
    active.link.close = lambda: closed.append("first")  # type: ignore[method-assign]
    return closed


def arrive(ways: TwoWays, request_id: int) -> None:
    """While what is under way on the first connector stays so."""
    hung = list(ways.fabric.pending)
    ways.begin(request_id)
    for transfer in [transfer for transfer in ways.fabric.pending if transfer not in hung]:
        transfer.land()
    assert isinstance(ways.poll(), HandoffArrived)
