"""Every order of follow, beat, loss, refusal, release, close and time, against a lease that is told in a few lines.

Two tickets share blocks. Their pins are given back once, never below zero, and exactly when the told lease ends.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvrelay_core.clock import ManualClock
from kvrelay_core.errors import LeaseExpiredError
from kvrelay_transfer.lease import Lease, LeaseEnd, LeaseState, LeaseTable
from kvrelay_transfer.ticket import LeaseTerms

TERMS = LeaseTerms(first_follow_s=5.0, beat_s=1.0, missed_beats=3, lost_grace_s=2.0, wall_cap_s=4.0)
STATE_S = {LeaseState.GRANTED: 5.0, LeaseState.FOLLOWED: 3.0, LeaseState.LOST: 2.0, LeaseState.ENDED: math.inf}
BLOCKS = {"a": (1, 2, 3), "b": (3, 4)}
FOLLOWS = {"a": (1, 2), "b": (3,)}  # who may follow which ticket


@dataclass
class ToldLease:
    """What should be true of one lease; times are those of the test's clock."""

    now_s: float = 0.0
    state: LeaseState = LeaseState.GRANTED
    since_s: float = 0.0
    follow: int | None = None
    has_stream: bool = True
    is_complete: bool = False
    wall_since_s: float | None = None

    def become(self, state: LeaseState, follow: int | None = None) -> None:
        self.state, self.since_s, self.follow = state, self.now_s, follow
        self.start_wall()

    def start_wall(self) -> None:
        if self.is_complete and self.follow is not None and self.wall_since_s is None:
            self.wall_since_s = self.now_s

    def tick(self) -> None:
        wall_s = math.inf if self.wall_since_s is None else self.wall_since_s + 4.0
        if self.now_s >= min(self.since_s + STATE_S[self.state], wall_s):
            self.become(LeaseState.ENDED)


class Told:
    """The table under test and the leases as told, moved together."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.table = LeaseTable(self.clock, self._unpin)
        self.references = Counter(block for blocks in BLOCKS.values() for block in blocks)
        self.told = {ticket: ToldLease() for ticket in BLOCKS}
        self.num_unpinned: Counter[str] = Counter()
        for ticket, blocks in BLOCKS.items():
            self.table.grant(ticket, blocks, TERMS)

    def _unpin(self, lease: Lease, reason: LeaseEnd) -> None:
        self.num_unpinned[lease.ticket_id] += 1
        self.references.subtract(lease.blocks)

    def attach(self, ticket: str, follow: int) -> None:
        told = self.told[ticket]
        try:
            self.table.attach(ticket, follow)
        except LeaseExpiredError:
            assert told.state is LeaseState.ENDED
            return
        assert told.state is not LeaseState.ENDED
        told.become(LeaseState.FOLLOWED, follow)

    def beat(self, ticket: str, follow: int) -> None:
        self.table.beat(follow)
        if self.told[ticket].follow == follow:
            self.told[ticket].since_s = self.clock.now()

    def lose(self, ticket: str, follow: int) -> None:
        self.table.lose(follow)
        if self.told[ticket].follow == follow:
            self.told[ticket].become(LeaseState.LOST)

    def leave(self, ticket: str, follow: int) -> None:
        self.table.leave(follow)
        if self.told[ticket].follow == follow:
            self.told[ticket].become(LeaseState.ENDED)

    def refuse(self, ticket: str, follow: int) -> None:
        self.table.refuse(follow)
        told = self.told[ticket]
        if told.follow == follow:
            told.wall_since_s = None
            told.become(LeaseState.GRANTED if told.has_stream else LeaseState.ENDED)

    def complete(self, ticket: str, follow: int) -> None:
        self.table.complete(ticket)
        self.told[ticket].is_complete = True
        self.told[ticket].start_wall()

    def close_stream(self, ticket: str, follow: int) -> None:
        self.table.close_stream(ticket)
        self.told[ticket].has_stream = False
        if self.told[ticket].state is LeaseState.GRANTED:
            self.told[ticket].become(LeaseState.ENDED)

    def release(self, ticket: str, follow: int) -> None:
        was_there = self.told[ticket].state is not LeaseState.ENDED
        assert self.table.end(ticket, LeaseEnd.RELEASED) is was_there
        self.told[ticket].become(LeaseState.ENDED)

    def pass_time(self, ticket: str, follow: int) -> None:
        """A second, or with the second ticket's name two."""
        self.clock.advance(1.0 if ticket == "a" else 2.0)
        self.table.tick()
        for told in self.told.values():
            told.now_s = self.clock.now()
            told.tick()

    def check(self) -> None:
        for ticket, told in self.told.items():
            lease = self.table.find(ticket)
            assert (lease.state if lease else LeaseState.ENDED) is told.state
            assert (lease.follow if lease else None) == told.follow
            assert self.num_unpinned[ticket] == (told.state is LeaseState.ENDED)
        assert min(self.references.values()) >= 0
        assert self.table.num_pinned == sum(count > 0 for count in self.references.values())
        assert self.table.num_leases == sum(told.state is not LeaseState.ENDED for told in self.told.values())


NAMES = ["attach", "beat", "lose", "leave", "refuse", "complete", "close_stream", "release", "pass_time"]
MOVES = [(name, ticket, follow) for name in NAMES for ticket, follows in FOLLOWS.items() for follow in follows]
QUIET = ["attach", "beat", "complete", "pass_time", "lose"]  # more of these, so that leases live to see the rest


@given(st.lists(st.sampled_from(MOVES + [move for move in MOVES if move[0] in QUIET]), max_size=30))
@example([("attach", "a", 1), ("attach", "a", 2), ("leave", "a", 1), ("leave", "a", 2), ("leave", "a", 2)])
@example([("complete", "a", 1), ("attach", "a", 1), ("refuse", "a", 1), ("attach", "a", 2), ("pass_time", "b", 3)])
@settings(max_examples=400, deadline=None)
def test_a_lease_is_as_told(moves: list[tuple[str, str, int]]) -> None:
    leases = Told()
    for name, ticket, follow in moves:
        getattr(leases, name)(ticket, follow)
        leases.check()
    for _ in range(5):  # time alone ends whatever is left
        leases.pass_time("a", 1)
        leases.check()
    assert leases.table.num_leases == leases.table.num_pinned == 0 and not any(leases.references.values())
