"""How much a reader asks of a peer next."""

from __future__ import annotations

import pytest

from kvrelay_engine.read_room import ReadRoom
from kvrelay_transfer.connectors.base import ReadWindow

WINDOW = ReadWindow(max_reads=4, max_read_bytes=100)


@pytest.mark.parametrize(
    ("num_reads", "under_way_bytes", "given_up_bytes", "expected"),
    [
        (0, 0, 0, 100),
        (3, 300, 0, 100),
        (4, 300, 0, 0),  # the hand-off has as many as suit the link
        (0, 950, 0, 50),  # up to the cap, whoever reads
        (0, 500, 450, 50),
        (0, 1000, 0, 0),
        (0, 100, 900, 0),
        (0, 0, 950, 50),
        (0, 0, 1000, 1),  # one read comes through
        (0, 0, 2000, 1),
    ],
)
def test_the_link_and_the_cap_bound_the_next_read(
    num_reads: int, under_way_bytes: int, given_up_bytes: int, expected: int
) -> None:
    room = ReadRoom(None, None, cap_bytes=1000)
    assert room.next_read_bytes(WINDOW, num_reads, under_way_bytes, given_up_bytes) == expected


def test_limits_that_were_set_hold_for_any_link() -> None:
    room = ReadRoom(max_reads=2, max_read_bytes=30, cap_bytes=1000)
    assert [room.next_read_bytes(WINDOW, num_reads, 0, 0) for num_reads in (0, 1, 2)] == [30, 30, 0]
