"""Records on their way from a pool into host memory, behind the back of the step that computed them.

An offer costs the engine's thread some dictionary work. The queue pins nothing: a block may be given away before or
while it is copied, which its fence word tells after the copy and before the part becomes visible (PROTOCOL A7).
"""

from __future__ import annotations

import threading
from functools import partial

from kvrelay_transfer.tiers.part_key import PartKey
from kvrelay_transfer.tiers.records import Record, RecordSource
from kvrelay_transfer.tiers.tier_stack import TierStack
from kvrelay_transfer.tiers.tier_stats import Count
from kvrelay_transfer.tiers.workers import Job


class Gatherer:
    """Thread-safe."""

    def __init__(self, stack: TierStack) -> None:
        self._stack = stack
        self._lock = threading.Lock()
        self._under_way: set[PartKey] = set()  # the first of each record

    def knows(self, record: Record) -> bool:
        """Stored or being stored, as far as is known here."""
        with self._lock:
            if record.keys[0] in self._under_way:
                return True
        return all(map(self._knows_part, record.keys))

    def offer(self, record: Record, source: RecordSource) -> bool:
        """False: dropped, or it is known."""
        if self.knows(record):
            return False
        with self._lock:
            self._under_way.add(record.keys[0])
        job = Job(partial(self._gather, record, source), partial(self._give_up, record))
        if self._stack.host.writers.post(job):
            return True
        self._give_up(record)
        return False

    def _knows_part(self, key: PartKey) -> bool:
        return key in self._stack.host.store or any(key in tier.known for tier in self._stack.tiers)

    def _gather(self, record: Record, source: RecordSource) -> None:
        for number in range(len(record.keys)):
            if not self._gather_part(record, number, source):
                break
        self._forget(record)

    def _gather_part(self, record: Record, number: int, source: RecordSource) -> bool:
        """False: the rest of the record is of no use."""
        host, key, raw_bytes = self._stack.host, record.keys[number], record.part_bytes[number]
        if key in host.store:
            return True
        slot = host.store.reserve(raw_bytes, self._stack.write_down.is_kept) or host.store.reserve(raw_bytes)
        if slot is None:
            host.counts.add(Count.DROPPED)
            return False
        is_intact = False
        try:
            source.copy_out(number, slot.body(raw_bytes))
            is_intact = source.is_intact()
        finally:
            if not is_intact:
                host.store.withdraw(slot)
        if not is_intact:
            host.counts.add(Count.STALE)
            return False
        host.store.publish(slot, key, len(record.keys), raw_bytes).give_back()
        host.counts.add(Count.WRITTEN)
        host.counts.add(Count.WRITTEN_BYTES, raw_bytes)
        self._stack.write_down.filled(key)
        return True

    def _give_up(self, record: Record) -> None:
        self._stack.host.counts.add(Count.DROPPED)
        self._forget(record)

    def _forget(self, record: Record) -> None:
        with self._lock:
            self._under_way.discard(record.keys[0])
