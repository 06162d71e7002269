"""Records on their way from the tiers into a pool: found, given room, loaded, in this order and from the first on.

The first loads while others are still looked up. Only what is contiguous counts: whatever is missing, bad, late or has
no room ends the fetch there, and is no error. The engine's thread polls; threads of the tiers look up, load, copy, and
post what comes next. The lock guards the state of one fetch; no store, no copy and no callback of the engine is called
under it (locks of queues and of the host store are taken under it, never the other way round).
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from msgspec import Struct

from kvrelay_transfer.tiers.host_store import Borrow
from kvrelay_transfer.tiers.part_key import PartKey
from kvrelay_transfer.tiers.part_search import HOST, PartSearch
from kvrelay_transfer.tiers.records import Record, RecordDestination
from kvrelay_transfer.tiers.tier import Tier
from kvrelay_transfer.tiers.tier_stack import TierStack
from kvrelay_transfer.tiers.tier_stats import Count
from kvrelay_transfer.tiers.workers import Job

TakeRoom = Callable[[int, int], list[RecordDestination] | None]
IsWorth = Callable[[int, float], bool]


class FetchLimits(Struct, frozen=True):
    max_parts_under_way: int = 8
    max_ahead_bytes: int = 256 << 20  # of records that have room and are not loaded


class _Wanted(NamedTuple):
    """Room for records [first, end), which could be loaded in about so many seconds."""

    first: int
    end: int
    seconds: float
    may_grow: bool  # more may be found: what is not worth it yet may be then


class Fetch:
    """For the engine's thread. What is public is as of the last `poll` or `abort`."""

    def __init__(
        self,
        stack: TierStack,
        records: Sequence[Record],
        take_room: TakeRoom,
        until_s: float,
        is_worth: IsWorth,
        limits: FetchLimits,
    ) -> None:
        """Use `TierChain.fetch`."""
        self._stack = stack
        self._records = tuple(records)
        self._take_room = take_room
        self._until_s = until_s
        self._is_worth = is_worth
        self._limits = limits
        # Parts are numbered through: those of record r begin at first_part[r].
        self._first_part = list(accumulate((len(record.keys) for record in records), initial=0))
        self._lock = threading.Lock()
        keys = [key for record in records for key in record.keys]
        self._search = PartSearch(stack, keys, until_s, self._lock, self._advance)
        self._rooms: list[RecordDestination] = []  # of the first records
        self._end = len(records)  # records from here on are given up
        self._missing = [len(record.keys) for record in records]  # parts that are not loaded
        self._num_posted = 0  # parts
        self._num_under_way = 0
        self._num_copying = 0  # into the pool, now
        self._num_loaded = 0
        self._is_ended = False
        with self._lock:
            self._search.advance()
            self._advance()
        self._show()

    # -------------------------------------------------------------------------------- the engine's thread

    def poll(self) -> None:
        """Never blocks. May call `take_room` and `is_worth`."""
        with self._lock:
            if self._stack.clock.now() >= self._until_s:
                self._end_now()
            wanted = self._wants_room()
        if wanted is not None:
            self._ask_for_room(wanted)
        self._show()

    def abort(self) -> None:
        """Ends it; what is loaded stays loaded. Idempotent."""
        with self._lock:
            self._end_now()
        self._show()

    def _show(self) -> None:
        with self._lock:
            self.num_found = self._num_found()
            self.num_loaded = self._num_loaded  # contiguous records whose bytes are in their destinations
            self.is_over = self._is_ended  # nothing more will come
            self.is_terminal = self._is_ended and self._num_copying == 0  # nobody writes to a destination any more

    def _ask_for_room(self, wanted: _Wanted) -> None:
        num_records = wanted.end - wanted.first
        if not self._is_worth(num_records, wanted.seconds):
            if not wanted.may_grow:
                with self._lock:
                    self._end_at(wanted.first)
            return
        rooms = self._take_room(wanted.first, wanted.end)
        with self._lock:
            if rooms is None:
                self._end_at(wanted.first)
            else:
                assert len(rooms) == num_records
                self._rooms += rooms
            self._advance()

    # ------------------------------------------------------------------------------------ under the lock

    def _advance(self) -> None:
        """Posts what can be posted; ends when all that can come has come."""
        self._post_parts()
        if self._search.is_over:
            self._end = min(self._end, self._num_found())
        if self._num_loaded >= self._end:
            self._end_now()

    def _post_parts(self) -> None:
        while self._num_under_way < self._limits.max_parts_under_way and not self._is_ended:
            index = self._num_posted
            if index >= self._first_part[min(len(self._rooms), self._end)] or index >= len(self._search.places):
                return
            borrow = self._stack.host.store.borrow(self._key(index))
            if borrow is None and self._search.places[index] == HOST:
                self._search.search_again(index)
            elif self._post_part(index, borrow):
                self._num_posted += 1
                self._num_under_way += 1
            else:
                self._end_at(self._record(index))

    def _post_part(self, index: int, borrow: Borrow | None) -> bool:
        """False: the queue is full."""
        if borrow is None:
            tier = self._stack.tiers[self._search.places[index]]
            return tier.readers.post(Job(partial(self._load, index, tier), partial(self._finish, index, False)))
        job = Job(partial(self._copy_from_host, index, borrow), partial(self._give_up, index, borrow))
        if self._stack.host.readers.post(job):
            return True
        borrow.give_back()
        return False

    def _wants_room(self) -> _Wanted | None:
        """Of what is found, the next that have no room yet, within the bound."""
        first, end = len(self._rooms), min(self._num_found(), self._end)
        ahead_bytes = sum(record.size_bytes for record in self._records[self._num_loaded : first])
        for number in range(first, end):
            ahead_bytes += self._records[number].size_bytes
            if ahead_bytes > self._limits.max_ahead_bytes and number > self._num_loaded:
                end = number
                break
        if self._is_ended or first >= end:
            return None
        return _Wanted(first, end, self._seconds_for(first, end), may_grow=not self._search.is_over)

    def _seconds_for(self, first: int, end: int) -> float:
        """With what waits before them, each of which takes about as long as one part of these."""
        sizes: Counter[int] = Counter()
        for index in range(self._first_part[first], self._first_part[end]):
            sizes[self._search.places[index]] += self._part_bytes(index)
        waiting_bytes = self._part_bytes(self._first_part[first])
        seconds = 0.0
        for place, size_bytes in sizes.items():
            tier = self._stack.host if place == HOST else self._stack.tiers[place]
            seconds += tier.speed.seconds_for(size_bytes + tier.readers.num_queued * waiting_bytes)
        return seconds

    def _end_at(self, record: int) -> None:
        self._end = min(self._end, record)
        if self._num_loaded >= self._end:
            self._end_now()

    def _end_now(self) -> None:
        self._is_ended = True
        self._search.stop()

    def _num_found(self) -> int:
        return bisect_right(self._first_part, len(self._search.places)) - 1

    # --------------------------------------------------------------------------- on threads of the tiers

    def _copy_from_host(self, index: int, borrow: Borrow) -> None:
        host = self._stack.host
        with borrow as part, host.speed.measure(len(part.raw)) as arrived:
            is_loaded = self._deliver(index, part.raw)
            if is_loaded:
                arrived()
                host.counts.add(Count.HITS)
                host.counts.add(Count.READ_BYTES, len(part.raw))
        self._finish(index, is_loaded)

    def _give_up(self, index: int, borrow: Borrow) -> None:
        borrow.give_back()
        self._finish(index, False)

    def _load(self, index: int, tier: Tier) -> None:
        promoted = self._stack.host.store.borrow(self._key(index))
        if promoted is not None:  # by another fetch, while this one waited
            self._copy_from_host(index, promoted)
            return
        is_loaded = False
        if self._is_wanted(index):
            num_parts = len(self._records[self._record(index)].keys)
            is_kept = self._stack.write_down.is_kept
            loaded = self._stack.mover.load(tier, self._key(index), num_parts, self._part_bytes(index), is_kept)
            if loaded is not None:
                try:
                    is_loaded = self._deliver(index, loaded.raw)
                finally:
                    loaded.give_back()
                self._stack.write_down.make_way()
        self._finish(index, is_loaded)

    def _deliver(self, index: int, raw: memoryview) -> bool:
        """False: it is not wanted any more, and nothing was written."""
        with self._lock:
            if not self._wants(index):
                return False
            self._num_copying += 1
        try:
            record = self._record(index)
            self._rooms[record].copy_in(index - self._first_part[record], raw)
        finally:
            with self._lock:
                self._num_copying -= 1
        return True

    def _finish(self, index: int, is_loaded: bool) -> None:
        with self._lock:
            self._num_under_way -= 1
            if self._is_ended:
                return
            record = self._record(index)
            if is_loaded:
                self._missing[record] -= 1
                while self._num_loaded < self._end and self._missing[self._num_loaded] == 0:
                    self._num_loaded += 1
            else:
                self._end_at(record)
            self._advance()

    def _is_wanted(self, index: int) -> bool:
        with self._lock:
            return self._wants(index)

    def _wants(self, index: int) -> bool:
        return not self._is_ended and self._record(index) < self._end

    # --------------------------------------------------------------------------------------------- parts

    def _record(self, index: int) -> int:
        return bisect_right(self._first_part, index) - 1

    def _key(self, index: int) -> PartKey:
        record = self._record(index)
        return self._records[record].keys[index - self._first_part[record]]

    def _part_bytes(self, index: int) -> int:
        record = self._record(index)
        return self._records[record].part_bytes[index - self._first_part[record]]
