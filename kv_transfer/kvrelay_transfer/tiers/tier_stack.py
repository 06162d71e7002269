"""The tiers as their users see them: host memory, what is below it in order, and what moves parts between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from kvrelay_core.clock import Clock
from kvrelay_transfer.tiers.host_store import HostStore
from kvrelay_transfer.tiers.part_mover import PartMover
from kvrelay_transfer.tiers.speed import Speed
from kvrelay_transfer.tiers.tier import Tier
from kvrelay_transfer.tiers.tier_stats import Count, Counts, TierStats
from kvrelay_transfer.tiers.workers import Workers
from kvrelay_transfer.tiers.write_down import WriteDown

_MAX_READS = 256  # that wait


class HostTier:
    """Host memory with the threads that copy between it and the pool."""

    def __init__(self, store: HostStore, clock: Clock, *, max_offers: int) -> None:
        self.store = store
        self.counts = Counts()
        self.speed = Speed(clock)
        on_bug = partial(self.counts.add, Count.ERRORS)
        self.readers = Workers("kvrelay-tier-host-r", store.num_readers, _MAX_READS, on_bug)
        self.writers = Workers("kvrelay-tier-host-w", store.num_writers, max_offers, on_bug)

    def stats(self) -> TierStats:
        num_queued = self.readers.num_queued + self.writers.num_queued
        return TierStats(
            self.store.name, self.counts.by_name(), self.store.occupancy(), num_queued, gb_per_s=self.speed.gb_per_s
        )


@dataclass(frozen=True, slots=True)
class TierStack:
    host: HostTier
    tiers: tuple[Tier, ...]  # fastest first
    mover: PartMover
    write_down: WriteDown
    clock: Clock
