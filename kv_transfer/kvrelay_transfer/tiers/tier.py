"""A store with its threads, and with a guard around each call: what fails is counted and is a miss.

Calls of the store are made on the tier's own threads only. A breaker keeps a store that fails from being asked at all;
threads that hang keep it from being asked, too. Knows parts, no records and no pools.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from typing import TypeVar

from msgspec import Struct

from kvrelay_core.clock import Clock
from kvrelay_transfer.tiers.breaker import Breaker
from kvrelay_transfer.tiers.known_keys import KnownKeys
from kvrelay_transfer.tiers.part_key import PartKey
from kvrelay_transfer.tiers.part_store import PartStore, StoreError, StoreUsage
from kvrelay_transfer.tiers.speed import Speed
from kvrelay_transfer.tiers.tier_stats import Count, Counts, TierStats
from kvrelay_transfer.tiers.workers import Job, Workers

log = logging.getLogger(__name__)

_USAGE_AGE_S = 5.0

T = TypeVar("T")


class WritePolicy(Enum):
    """When a part is written to a tier below host memory."""

    COMPLETION = "completion"  # as soon as it is in host memory
    EVICTION = "eviction"  # before host memory evicts it


class TierLimits(Struct, frozen=True):
    max_reads: int = 256  # that wait; lookups among them
    max_writes: int = 64
    stuck_s: float = 5.0  # a call that takes longer hangs
    max_errors: int = 3  # in a row, then the tier is left alone
    pause_s: float = 1.0  # for so long at first
    max_pause_s: float = 30.0


class Tier:
    """The store's methods, which never raise here. Thread-safe; the store is the tier's from now on."""

    def __init__(
        self,
        store: PartStore,
        clock: Clock,
        *,
        policy: WritePolicy = WritePolicy.COMPLETION,
        limits: TierLimits | None = None,
    ) -> None:
        limits = limits or TierLimits()
        self.name = store.name
        self.policy = policy
        self.known = KnownKeys()
        self.counts = Counts()
        self.speed = Speed(clock)
        self.breaker = Breaker(
            clock, max_errors=limits.max_errors, pause_s=limits.pause_s, max_pause_s=limits.max_pause_s
        )
        on_bug = partial(self.counts.add, Count.ERRORS)
        self.readers = Workers(f"kvrelay-tier-{store.name}-r", store.num_readers, limits.max_reads, on_bug)
        self.writers = Workers(f"kvrelay-tier-{store.name}-w", store.num_writers, limits.max_writes, on_bug)
        self._clock = clock
        self._store = store
        self._stuck_s = limits.stuck_s
        self._usage = StoreUsage(0, 0, 0)
        self._usage_s = -_USAGE_AGE_S  # when it was asked for

    @property
    def can_read(self) -> bool:
        """Whether asking it has a point now."""
        return not self.breaker.is_open and not self.readers.are_stuck(self._stuck_s)

    @property
    def can_write(self) -> bool:
        return not self.breaker.is_open and not self.writers.are_stuck(self._stuck_s)

    # ------------------------------------------------------------------------- calls, on the tier's threads

    def count_prefix(self, keys: Sequence[PartKey]) -> int:
        """0 when it cannot be asked."""
        begun_s = self._clock.now()
        found = self._call(lambda: self._store.count_prefix(keys))
        if found is None:
            return 0
        self.speed.record_latency(self._clock.now() - begun_s)
        if found < len(keys):
            self.counts.add(Count.MISSES)
        return found

    def get(self, key: PartKey, into: memoryview, raw_bytes: int) -> int | None:
        """The length of what is in `into`, unverified; None when nothing came."""
        with self.speed.measure(raw_bytes) as arrived:
            length = self._call(lambda: self._store.get(key, into))
            if length is not None:
                arrived()
                return length
        self.known.discard((key,))
        self.counts.add(Count.MISSES)
        return None

    def write(self, key: PartKey, seal: Callable[[], memoryview]) -> bool:
        """Whether the part is there now. What `seal` gives is put, unless the tier has the part."""
        present = self._call(lambda: self._store.count_prefix((key,)))
        if present is None:
            return False
        if present:
            return True
        part = seal()
        if not self._call(lambda: self._store.put(key, part)):
            return False
        self.counts.add(Count.WRITTEN)
        self.counts.add(Count.WRITTEN_BYTES, len(part))
        return True

    def reject(self, key: PartKey) -> None:
        """What came is not what was asked for."""
        self.known.discard((key,))
        self.counts.add(Count.BAD)
        self._call(lambda: self._store.remove(key))

    def _call(self, call: Callable[[], T]) -> T | None:
        if not self.breaker.admit():
            return None
        try:
            answer = call()
        except StoreError as error:
            log.info("%s: %s", self.name, error)
            self.counts.add(Count.ERRORS)
            self.breaker.fail()
            return None
        except Exception:  # a bug of the store, which the worker logs and counts
            self.breaker.fail()
            raise
        self.breaker.succeed()
        return answer

    # -------------------------------------------------------------------------------------- from anywhere

    def stats(self) -> TierStats:
        """The usage is asked for now and then, and shown when the answer is there."""
        now_s = self._clock.now()
        if now_s - self._usage_s >= _USAGE_AGE_S:
            self._usage_s = now_s
            self.writers.post(Job(self._refresh_usage, lambda: None))
        return TierStats(
            self.name,
            self.counts.by_name(),
            self._usage,
            num_queued=self.readers.num_queued + self.writers.num_queued,
            is_open=self.breaker.is_open,
            num_openings=self.breaker.num_openings,
            gb_per_s=self.speed.gb_per_s,
        )

    def stop(self) -> None:
        """Waiting jobs are given up, running ones made to end."""
        self.readers.stop()
        self.writers.stop()
        try:
            self._store.close()
        except StoreError as error:
            log.info("%s: %s", self.name, error)

    def join(self, timeout_s: float) -> bool:
        """After `stop`: whether all threads have ended."""
        return all([self.readers.join(timeout_s), self.writers.join(timeout_s)])

    def _refresh_usage(self) -> None:
        self._usage = self._call(self._store.usage) or self._usage
