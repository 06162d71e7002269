"""The lease of a ticket, way by way. `test_lease_properties.py` takes the ways in every order."""

from __future__ import annotations

import pytest

from kvrelay_core.clock import ManualClock
from kvrelay_core.errors import LeaseExpiredError
from kvrelay_transfer.lease import Lease, LeaseEnd, LeaseState, LeaseTable
from kvrelay_transfer.ticket import LeaseTerms

TERMS = LeaseTerms()
FOLLOW = 7


class Leases:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.ended: list[tuple[str, LeaseEnd]] = []
        self.table = LeaseTable(self.clock, self._note)
        self.lease = self.table.grant("t", (1, 2, 3), TERMS)

    def _note(self, lease: Lease, reason: LeaseEnd) -> None:
        assert lease.state is LeaseState.ENDED
        self.ended.append((lease.ticket_id, reason))

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.table.tick()


@pytest.fixture
def leases() -> Leases:
    return Leases()


def test_a_ticket_that_nobody_follows_ends_at_the_cap(leases: Leases) -> None:
    leases.pass_time(29.75)
    assert leases.table.num_pinned == 3
    leases.pass_time(0.25)
    assert leases.ended == [("t", LeaseEnd.NEVER_FOLLOWED)]
    assert leases.table.num_pinned == leases.table.num_leases == 0


def test_a_closed_prefill_stream_frees_at_once(leases: Leases) -> None:
    leases.table.close_stream("t")
    assert leases.ended == [("t", LeaseEnd.STREAM_CLOSED)]


def test_a_follow_outlives_the_prefill_stream(leases: Leases) -> None:
    leases.table.attach("t", FOLLOW)
    leases.table.close_stream("t")
    leases.pass_time(1.0)
    assert leases.ended == []
    leases.table.leave(FOLLOW)
    assert leases.ended == [("t", LeaseEnd.LEFT)]


def test_a_pause_of_a_second_and_a_half_does_no_harm(leases: Leases) -> None:
    leases.table.attach("t", FOLLOW)
    for _ in range(20):
        leases.pass_time(1.5)
        leases.table.beat(FOLLOW)
    assert leases.ended == []


def test_three_missed_beats_end_it(leases: Leases) -> None:
    leases.table.attach("t", FOLLOW)
    leases.pass_time(2.75)
    leases.table.beat(FOLLOW)
    leases.pass_time(2.75)
    assert leases.ended == []
    leases.pass_time(0.25)
    assert leases.ended == [("t", LeaseEnd.BEATS_MISSED)]
    assert leases.lease.follow == FOLLOW, "the Follow has to be told"


def test_beats_that_queued_up_while_we_stood_still_count(leases: Leases) -> None:
    leases.table.attach("t", FOLLOW)
    leases.clock.advance(60.0)
    leases.table.beat(FOLLOW)
    leases.table.tick()
    assert leases.ended == []


def test_a_lost_connection_has_a_grace(leases: Leases) -> None:
    leases.table.attach("t", FOLLOW)
    leases.table.lose(FOLLOW)
    leases.pass_time(1.9)
    assert leases.table.attach("t", FOLLOW + 1) is None
    leases.pass_time(1.9)
    assert leases.ended == []
    leases.table.lose(FOLLOW + 1)
    leases.pass_time(2.0)
    assert leases.ended == [("t", LeaseEnd.NOT_RECOVERED)]


def test_a_lost_follow_cannot_beat_or_leave(leases: Leases) -> None:
    leases.table.attach("t", FOLLOW)
    leases.table.lose(FOLLOW)
    leases.table.beat(FOLLOW)
    leases.table.leave(FOLLOW)
    assert leases.ended == [] and leases.lease.state is LeaseState.LOST


def test_a_refused_ticket_goes_back_to_the_stream(leases: Leases) -> None:
    leases.table.attach("t", FOLLOW)
    leases.table.refuse(FOLLOW)
    assert leases.lease.state is LeaseState.GRANTED and leases.table.num_pinned == 3
    leases.table.attach("t", FOLLOW + 1)
    leases.table.beat(FOLLOW)  # the former reader has no say any more
    leases.table.leave(FOLLOW)
    assert leases.ended == []


def test_a_refused_ticket_without_a_stream_ends(leases: Leases) -> None:
    leases.table.attach("t", FOLLOW)
    leases.table.close_stream("t")
    leases.table.refuse(FOLLOW)
    assert leases.ended == [("t", LeaseEnd.LEFT)]


def test_the_newest_follow_takes_over(leases: Leases) -> None:
    leases.table.attach("t", FOLLOW)
    assert leases.table.attach("t", FOLLOW + 1) == FOLLOW
    leases.table.lose(FOLLOW)
    assert leases.lease.state is LeaseState.FOLLOWED


def test_release_is_idempotent(leases: Leases) -> None:
    assert leases.table.end("t", LeaseEnd.RELEASED)
    assert not leases.table.end("t", LeaseEnd.RELEASED)
    assert leases.ended == [("t", LeaseEnd.RELEASED)]


def test_an_ended_lease_cannot_be_followed(leases: Leases) -> None:
    leases.table.end("t", LeaseEnd.RELEASED)
    with pytest.raises(LeaseExpiredError):
        leases.table.attach("t", FOLLOW)


def test_the_wall_cap_runs_while_complete_and_followed(leases: Leases) -> None:
    leases.table.attach("t", FOLLOW)
    for _ in range(30):  # a long prefill
        leases.pass_time(1.0)
        leases.table.beat(FOLLOW)
    leases.table.complete("t")
    for _ in range(9):
        leases.pass_time(1.0)
        leases.table.beat(FOLLOW)
    assert leases.ended == []
    leases.pass_time(1.0)
    assert leases.ended == [("t", LeaseEnd.WALL_CAP)]


def test_a_new_reader_gets_the_wall_cap_anew(leases: Leases) -> None:
    leases.table.complete("t")
    leases.table.attach("t", FOLLOW)
    leases.pass_time(2.5)
    leases.table.refuse(FOLLOW)
    leases.pass_time(20.0)
    leases.table.attach("t", FOLLOW + 1)
    for _ in range(4):
        leases.pass_time(2.0)
        leases.table.beat(FOLLOW + 1)
    assert leases.ended == []


def test_shared_blocks_count_once(leases: Leases) -> None:
    leases.table.grant("u", (3, 4), TERMS)
    assert leases.table.num_pinned == 4
    leases.table.end("t", LeaseEnd.RELEASED)
    assert leases.table.num_pinned == 2


@pytest.mark.parametrize("reason", list(LeaseEnd))
def test_only_time_makes_an_expiry(reason: LeaseEnd) -> None:
    by_time = {LeaseEnd.NEVER_FOLLOWED, LeaseEnd.BEATS_MISSED, LeaseEnd.NOT_RECOVERED, LeaseEnd.WALL_CAP}
    assert reason.is_expiry == (reason in by_time)
