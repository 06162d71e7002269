"""The lease table and the lease model agree in every state that the model reaches."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest
from protocol_model.lease import (
    FIRST_FOLLOW,
    LOST_GRACE,
    MISSED_BEATS,
    WALL_CAP,
    LeaseModel,
    LeaseRules,
    LeaseState,
    World,
)

from kvrelay_core.clock import ManualClock
from kvrelay_core.errors import LeaseExpiredError
from kvrelay_transfer.lease import Lease, LeaseEnd, LeaseTable
from kvrelay_transfer.ticket import LeaseTerms

TERMS = LeaseTerms(
    first_follow_s=FIRST_FOLLOW, beat_s=1.0, missed_beats=MISSED_BEATS, lost_grace_s=LOST_GRACE, wall_cap_s=WALL_CAP
)
OURS, OTHERS, SHARED = 1, 2, 3


class Replay:
    """Does to a lease table what the steps of the model mean."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.ended: list[str] = []
        self.table = LeaseTable(self.clock, self._note_end)
        self.follow = 0
        self.table.grant("ticket", (OURS, SHARED), TERMS)
        self.table.grant("other", (OTHERS, SHARED), LeaseTerms(first_follow_s=1e9))

    def _note_end(self, lease: Lease, reason: LeaseEnd) -> None:
        self.ended.append(lease.ticket_id)

    def do(self, step: str) -> None:
        match step:
            case "router closes the stream":
                self.table.close_stream("ticket")
            case "router sends Release":
                self.table.end("ticket", LeaseEnd.RELEASED)
            case "reader follows":
                self.follow += 1
                self.table.attach("ticket", self.follow)
            case "reader releases":
                self.table.leave(self.follow)
            case "reader refuses":
                self.table.refuse(self.follow)
            case "reader dies" | "transport breaks":
                self.table.lose(self.follow)
            case "prefill completes":
                self.table.complete("ticket")
            case "tick, beat":
                self.clock.advance(1.0)
                self.table.beat(self.follow)
                self.table.tick()
            case "tick" | "tick, no beat":
                self.clock.advance(1.0)
                self.table.tick()
            case _:
                assert step == "reader hangs", f"the model has a step that is not replayed: {step}"

    @property
    def state(self) -> str:
        lease = self.table.find("ticket")
        return LeaseState.ENDED if lease is None else lease.state.value


def shortest_traces() -> Iterator[tuple[tuple[str, ...], World]]:
    model = LeaseModel(LeaseRules())
    start = model.initial()
    seen = {start}
    frontier: deque[tuple[tuple[str, ...], World]] = deque([((), start)])
    while frontier:
        trace, world = frontier.popleft()
        yield trace, world
        for step, successor in model.steps(world):
            if successor not in seen:
                seen.add(successor)
                frontier.append(((*trace, step), successor))


def test_lease_table_and_model_agree() -> None:
    num_ended = 0
    for trace, world in shortest_traces():
        replay = Replay()
        for step in trace:
            replay.do(step)
        assert replay.state == world.lease, " > ".join(trace)
        assert replay.ended == ["ticket"] * (world.lease is LeaseState.ENDED), " > ".join(trace)
        assert replay.table.num_pinned == (3 if world.holders == 2 else 2), " > ".join(trace)
        num_ended += world.lease is LeaseState.ENDED
    assert num_ended > 10


def test_an_ended_ticket_cannot_be_followed() -> None:
    replay = Replay()
    replay.do("router sends Release")
    with pytest.raises(LeaseExpiredError):
        replay.do("reader follows")
