"""Who holds the pins of a ticket, and until when (PROTOCOL B).

    granted   by Prefill's stream; ends `first_follow_s` later unless a Follow attaches
    followed  by a Follow; ends when `missed_beats` heartbeats stay away
    lost      the Follow's transport broke; ends `lost_grace_s` later unless the ticket is followed again
    ended     the pins are given back, exactly once; final

A reader that refuses the ticket gives it back to Prefill's stream (granted again, for another reader). Once the
ticket is complete and followed the wall cap runs as well, whatever beats come.

Time passes only in `tick()`: a beat that was late because *this* process stood still counts, so call `tick()`
after the commands that have queued up. The table knows nothing of pools, streams or KV; `on_end` unpins.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from kvrelay_core.clock import Clock
from kvrelay_core.errors import LeaseExpiredError
from kvrelay_transfer.ticket import LeaseTerms


class LeaseState(Enum):
    GRANTED = "granted"
    FOLLOWED = "followed"
    LOST = "lost"
    ENDED = "ended"


class LeaseEnd(Enum):
    """Why a lease ended; the value completes "the lease of the ticket ended: ..."."""

    LEFT = "its reader left"
    RELEASED = "it was released by a call"
    STREAM_CLOSED = "the stream that asked for the prefill closed before a reader followed"
    REQUEST_FAILED = "its request failed"
    NEVER_FOLLOWED = "no reader followed in time"
    BEATS_MISSED = "its reader sent no heartbeat"
    NOT_RECOVERED = "the reader's lost connection did not come back"
    WALL_CAP = "it was complete and followed for longer than the pull could take"

    @property
    def is_expiry(self) -> bool:
        return self in _EXPIRY.values() or self is LeaseEnd.WALL_CAP


_EXPIRY = {
    LeaseState.GRANTED: LeaseEnd.NEVER_FOLLOWED,
    LeaseState.FOLLOWED: LeaseEnd.BEATS_MISSED,
    LeaseState.LOST: LeaseEnd.NOT_RECOVERED,
}


@dataclass(slots=True, eq=False)
class Lease:
    ticket_id: str
    blocks: tuple[int, ...]
    terms: LeaseTerms
    state: LeaseState
    expires_s: float  # when the state ends by itself
    wall_expires_s: float = math.inf
    follow: int | None = None  # the Follow that holds it, when followed
    has_stream: bool = True  # Prefill's stream is there to take it back
    is_complete: bool = False


class LeaseTable:
    def __init__(self, clock: Clock, on_end: Callable[[Lease, LeaseEnd], None]) -> None:
        """`on_end` is called once for each lease, when it has left the table."""
        self._clock = clock
        self._on_end = on_end
        self._leases: dict[str, Lease] = {}
        self._by_follow: dict[int, Lease] = {}
        self._holders: Counter[int] = Counter()  # leases per block

    # ------------------------------------------------------------------------------------------- queries

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    @property
    def num_pinned(self) -> int:
        """Blocks that one or more leases hold, each counted once."""
        return len(self._holders)

    def is_pinned(self, block: int) -> bool:
        return block in self._holders

    def find(self, ticket_id: str) -> Lease | None:
        return self._leases.get(ticket_id)

    # ------------------------------------------------------------------------------------- grant, attach

    def grant(self, ticket_id: str, blocks: tuple[int, ...], terms: LeaseTerms) -> Lease:
        """The caller has pinned `blocks`."""
        assert ticket_id not in self._leases, "a ticket is granted once"
        lease = Lease(ticket_id, blocks, terms, LeaseState.GRANTED, self._clock.now() + terms.first_follow_s)
        self._leases[ticket_id] = lease
        self._holders.update(set(blocks))
        return lease

    def attach(self, ticket_id: str, follow: int) -> int | None:
        """`follow` holds the lease from now on. Returns the Follow that it superseded, if any is still open.

        Raises LeaseExpiredError when the lease has ended.
        """
        lease = self._leases.get(ticket_id)
        if lease is None:
            raise LeaseExpiredError("the lease of the ticket has ended; prefill again", ticket_id=ticket_id)
        superseded = lease.follow if lease.follow != follow else None
        self._detach(lease)
        lease.follow = follow
        lease.state = LeaseState.FOLLOWED
        self._by_follow[follow] = lease
        self._extend(lease)
        self._start_wall_cap(lease)
        return superseded

    def beat(self, follow: int) -> None:
        lease = self._by_follow.get(follow)
        if lease is not None:
            self._extend(lease)

    def complete(self, ticket_id: str) -> None:
        """All KV of the ticket is there to be pulled."""
        lease = self._leases.get(ticket_id)
        if lease is not None:
            lease.is_complete = True
            self._start_wall_cap(lease)

    # ---------------------------------------------------------------------------------- lose, leave, end

    def lose(self, follow: int) -> None:
        """The Follow's transport ended without a release."""
        lease = self._by_follow.get(follow)
        if lease is not None:
            self._detach(lease)
            lease.state = LeaseState.LOST
            lease.expires_s = self._clock.now() + lease.terms.lost_grace_s

    def leave(self, follow: int) -> None:
        """The reader is through with the ticket."""
        lease = self._by_follow.get(follow)
        if lease is not None:
            self._end(lease, LeaseEnd.LEFT)

    def refuse(self, follow: int) -> None:
        """The reader has no room: the lease goes back to Prefill's stream, if that is still there."""
        lease = self._by_follow.get(follow)
        if lease is None:
            return
        if not lease.has_stream:
            self._end(lease, LeaseEnd.LEFT)
            return
        self._detach(lease)
        lease.state = LeaseState.GRANTED
        lease.expires_s = self._clock.now() + lease.terms.first_follow_s
        lease.wall_expires_s = math.inf

    def close_stream(self, ticket_id: str) -> None:
        """Prefill's stream is gone for good: ends the lease unless a Follow has taken it over."""
        lease = self._leases.get(ticket_id)
        if lease is None:
            return
        lease.has_stream = False
        if lease.state is LeaseState.GRANTED:
            self._end(lease, LeaseEnd.STREAM_CLOSED)

    def end(self, ticket_id: str, reason: LeaseEnd) -> bool:
        """Ends the lease whoever holds it; False when it had ended before."""
        lease = self._leases.get(ticket_id)
        if lease is None:
            return False
        self._end(lease, reason)
        return True

    def tick(self) -> None:
        """Ends the leases whose time is over."""
        now_s = self._clock.now()
        for lease in list(self._leases.values()):
            if lease.expires_s <= now_s:
                self._end(lease, _EXPIRY[lease.state])
            elif lease.wall_expires_s <= now_s:
                self._end(lease, LeaseEnd.WALL_CAP)

    # ------------------------------------------------------------------------------------------ internal

    def _extend(self, lease: Lease) -> None:
        lease.expires_s = self._clock.now() + lease.terms.beat_s * lease.terms.missed_beats

    def _start_wall_cap(self, lease: Lease) -> None:
        is_running = lease.wall_expires_s < math.inf
        if lease.is_complete and lease.follow is not None and not is_running:
            lease.wall_expires_s = self._clock.now() + lease.terms.wall_cap_s

    def _detach(self, lease: Lease) -> None:
        if lease.follow is not None:
            del self._by_follow[lease.follow]
            lease.follow = None

    def _end(self, lease: Lease, reason: LeaseEnd) -> None:
        del self._leases[lease.ticket_id]
        if lease.follow is not None:  # stays named in the lease: `on_end` may want to tell it
            del self._by_follow[lease.follow]
        lease.state = LeaseState.ENDED
        for block in set(lease.blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
        self._on_end(lease, reason)
