"""Model of PROTOCOL B2 to B5: who holds the pins of one ticket, and until when, with time in ticks of one beat.

The issuer sees only messages and time; the reader and the router behave in every way that they may, including
pauses, lost transports, hangs and deaths. One block of the ticket is shared with a second ticket whose reader
stays. Not modelled: signatures, which blocks, what `Ready` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

PINS_LOST = "PINS LOST"
PINS_LEAKED = "PINS LEAKED"
TICKET_WASTED = "TICKET WASTED"

# The terms of the ticket, in ticks.
FIRST_FOLLOW = 4
MISSED_BEATS = 3
LOST_GRACE = 2
WALL_CAP = 6
# A reader that pauses for so many beats, or is away for so many ticks, is expected to be served on.
LONGEST_PAUSE = 2
LONGEST_ABSENCE = 1


@dataclass(frozen=True)
class LeaseRules:
    follow_takes_over: bool = True  # B2: once followed, the end of Prefill's stream does not matter
    cap_until_followed: bool = True  # B2: a ticket that nobody follows ends after a while
    require_engine_beats: bool = True  # B3: an open stream alone holds nothing, the engine must send beats
    tolerate_pauses: bool = True  # B3: one late beat does not end the lease
    grace_for_lost_transport: bool = True  # B4: a lost transport may come back
    leaving_frees_at_once: bool = True  # B4: Release, and closing Prefill's stream, need no timer
    refused_returns_to_stream: bool = True  # B4, B6: a refused ticket can be offered to another reader
    release_is_idempotent: bool = True  # B4: a second Release does nothing
    count_holders: bool = True  # B4: a block is free when its last holder has left
    cap_the_pull: bool = True  # B5: a complete ticket is not held for ever by a reader that beats but never ends


class LeaseState(StrEnum):
    GRANTED = "granted"
    FOLLOWED = "followed"
    LOST = "lost"
    ENDED = "ended"


class Reader(StrEnum):
    """What is true of the reader, whatever the issuer believes."""

    ABSENT = "absent"
    PULLING = "pulling"
    HUNG = "hung"  # its event loop lives, its engine does not
    AWAY = "away"  # its transport broke, it is coming back
    GONE = "gone"


class World(NamedTuple):
    lease: LeaseState = LeaseState.GRANTED
    expires_in: int = FIRST_FOLLOW
    cap_in: int | None = None  # set once the ticket is complete and followed
    has_stream: bool = True  # Prefill's, to the router
    is_complete: bool = False
    reader: Reader = Reader.ABSENT
    silent: int = 0  # beats missed in a row, or ticks away
    unused: int = 0  # ticks for which nobody alive had a use for the pins
    pulled: int = 0  # ticks since then
    has_left: bool = False  # the last party with an interest left on purpose
    holders: int = 2  # of the shared block: this ticket and the other
    was_cut_off: bool = False  # the lease ended under a reader that had a right to it
    was_wasted: bool = False  # the lease ended although the ticket could be offered to another reader
    releases: int = 0  # Release calls of the router so far


Step = tuple[str, World]


class LeaseModel:
    def __init__(self, rules: LeaseRules) -> None:
        self._rules = rules

    def initial(self) -> World:
        return World()

    def steps(self, world: World) -> Iterator[Step]:
        yield from self._router_steps(world)
        if world.lease is LeaseState.ENDED:
            return
        yield from self._reader_steps(world)
        if not world.is_complete:
            yield "prefill completes", self._with_cap(world._replace(is_complete=True))
        yield from self._ticks(world)

    def violation(self, world: World) -> str | None:
        if world.was_cut_off:
            return f"{PINS_LOST}: the lease ended under a reader that pulls"
        if world.holders == 0:
            return f"{PINS_LOST}: a block was freed that another ticket holds"
        if world.was_wasted:
            return f"{TICKET_WASTED}: a refused ticket cannot be offered to another reader"
        if world.lease is LeaseState.ENDED:
            return None
        if world.has_left:
            return f"{PINS_LEAKED}: everybody left on purpose and the pins are still held"
        if world.unused > max(FIRST_FOLLOW, MISSED_BEATS, LOST_GRACE):
            return f"{PINS_LEAKED}: held for {world.unused} ticks without use"
        if world.pulled > WALL_CAP:
            return f"{PINS_LEAKED}: held for {world.pulled} ticks by a reader that never ends"
        return None

    def is_finished(self, world: World) -> bool:
        return world.lease is LeaseState.ENDED

    # ------------------------------------------------------------------------------- what may happen

    def _router_steps(self, world: World) -> Iterator[Step]:
        if world.has_stream:
            closed = world._replace(has_stream=False)
            if world.lease is LeaseState.GRANTED:
                yield "router closes the stream", self._left(closed)
            elif world.lease is not LeaseState.ENDED and not self._rules.follow_takes_over:
                yield "router closes the stream", self._ended(closed)
            else:
                yield "router closes the stream", closed
        if world.releases < 2:
            yield "router sends Release", self._released(world)

    def _reader_steps(self, world: World) -> Iterator[Step]:
        if world.reader in (Reader.ABSENT, Reader.AWAY):
            yield "reader follows", self._attached(world)
        if world.reader is not Reader.PULLING:
            return
        gone = world._replace(reader=Reader.GONE, silent=0)
        yield "reader releases", self._left(gone)
        yield "reader refuses", self._refused(world._replace(reader=Reader.ABSENT, silent=0))
        yield "reader hangs", world._replace(reader=Reader.HUNG)
        yield "reader dies", self._lost(gone)
        yield "transport breaks", self._lost(world._replace(reader=Reader.AWAY, silent=0))

    def _ticks(self, world: World) -> Iterator[Step]:
        """One tick passes: the reader beats, or does not, and then the issuer looks at its clock."""
        later = world._replace(expires_in=world.expires_in - 1)
        if world.cap_in is not None:
            later = later._replace(cap_in=world.cap_in - 1, pulled=world.pulled + 1)
        if world.reader is not Reader.PULLING:
            later = later._replace(unused=world.unused + 1)
        if world.reader is Reader.PULLING:
            beaten = later._replace(silent=0, unused=0, expires_in=self._beats_allowed)
            yield "tick, beat", self._expired(beaten)
            if world.silent < LONGEST_PAUSE:
                yield "tick, no beat", self._expired(later._replace(silent=world.silent + 1))
        elif world.reader is Reader.AWAY:
            is_back_late = world.silent >= LONGEST_ABSENCE
            away = later._replace(reader=Reader.GONE if is_back_late else Reader.AWAY, silent=world.silent + 1)
            yield "tick", self._expired(away)
        else:
            yield "tick", self._expired(later)

    # --------------------------------------------------------------------------- what the issuer does

    @property
    def _beats_allowed(self) -> int:
        return MISSED_BEATS if self._rules.tolerate_pauses else 1

    def _attached(self, world: World) -> World:
        world = world._replace(lease=LeaseState.FOLLOWED, reader=Reader.PULLING, silent=0, unused=0)
        return self._with_cap(world._replace(expires_in=self._beats_allowed))

    def _with_cap(self, world: World) -> World:
        starts = world.is_complete and world.lease is not LeaseState.GRANTED and world.cap_in is None
        return world._replace(cap_in=WALL_CAP) if starts else world

    def _left(self, world: World) -> World:
        if self._rules.leaving_frees_at_once:
            return self._ended(world)
        return world._replace(lease=LeaseState.LOST, expires_in=LOST_GRACE, has_left=True)

    def _lost(self, world: World) -> World:
        if self._rules.grace_for_lost_transport:
            return world._replace(lease=LeaseState.LOST, expires_in=LOST_GRACE)
        return self._ended(world)

    def _refused(self, world: World) -> World:
        if not world.has_stream:
            return self._ended(world)
        if not self._rules.refused_returns_to_stream:
            return self._ended(world)._replace(was_wasted=True)
        return world._replace(lease=LeaseState.GRANTED, expires_in=FIRST_FOLLOW, cap_in=None, unused=0, pulled=0)

    def _released(self, world: World) -> World:
        world = world._replace(releases=world.releases + 1)
        if world.lease is not LeaseState.ENDED:
            # The router knows what it does: a reader that still pulls is one that it gave up.
            reader = Reader.ABSENT if world.reader is Reader.ABSENT else Reader.GONE
            return self._ended(world._replace(reader=reader))
        return world if self._rules.release_is_idempotent else world._replace(holders=world.holders - 1)

    def _expired(self, world: World) -> World:
        is_over = world.expires_in <= 0
        if world.lease is LeaseState.GRANTED:
            is_over = is_over and self._rules.cap_until_followed
        if world.lease is LeaseState.FOLLOWED:
            is_over = is_over and self._rules.require_engine_beats
        if world.cap_in is not None and world.cap_in <= 0 and self._rules.cap_the_pull:
            return self._ended(world._replace(reader=Reader.GONE))  # nobody has a right beyond the cap
        # A tick more or less below zero is the same: it keeps the model finite.
        return self._ended(world) if is_over else world._replace(expires_in=max(world.expires_in, 0))

    def _ended(self, world: World) -> World:
        holders = world.holders - 1 if self._rules.count_holders else 0
        was_cut_off = world.reader in (Reader.PULLING, Reader.AWAY)
        return world._replace(lease=LeaseState.ENDED, holders=holders, was_cut_off=was_cut_off)
