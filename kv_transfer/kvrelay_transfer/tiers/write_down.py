"""Parts of host memory on their way to the tiers below: when they are whole, or before host memory evicts them.

Never waits: what has no room in a tier's queue is dropped and counted. A part that waits to be written is lent, so it
stays in host memory; at most half of it is lent so.
"""

from __future__ import annotations

import threading
import time
from functools import partial

from kvrelay_transfer.tiers.host_store import Borrow, HostStore
from kvrelay_transfer.tiers.part_key import PartKey
from kvrelay_transfer.tiers.part_mover import PartMover
from kvrelay_transfer.tiers.tier import Tier, WritePolicy
from kvrelay_transfer.tiers.tier_stats import Count
from kvrelay_transfer.tiers.workers import Job

_MAX_AHEAD = 16  # parts that are written before their turn to be evicted comes


class WriteDown:
    """Thread-safe."""

    def __init__(self, host: HostStore, tiers: tuple[Tier, ...], mover: PartMover) -> None:
        self._host = host
        self._tiers = tiers
        self._mover = mover
        self._num_ahead = max(1, min(_MAX_AHEAD, host.num_slots // 8))
        self._may_lend = threading.Semaphore(max(1, host.num_slots // 2))

    def filled(self, key: PartKey) -> None:
        """The part is new in host memory."""
        for tier in self._tiers:
            if tier.policy is WritePolicy.COMPLETION:
                self._post(tier, key)
        self.make_way()

    def make_way(self) -> None:
        """Writes the next part that is to be evicted and is nowhere else, if the time for that is near."""
        if self._host.num_free >= self._num_ahead:
            return
        # What one lacks that is down keeps nothing from the others.
        tiers = [tier for tier in self._tiers if tier.can_write]
        coldest = self._host.borrow_coldest(
            lambda key: any(key not in tier.known for tier in tiers), max_asked=2 * self._num_ahead
        )
        if coldest is not None:
            with coldest as part:
                for tier in tiers:
                    self._post(tier, part.key)

    def is_kept(self, key: PartKey) -> bool:
        """Some tier below has it, or will: evicting it from host memory loses nothing."""
        return any(key in tier.known for tier in self._tiers)

    def write_all(self, until_s: float) -> None:
        """Whatever a tier lacks is written, newest first, until then (`time.monotonic`). Waits for room in queues."""
        for tier in self._tiers:
            for key in reversed(self._host.oldest_first()):
                if key not in tier.known and tier.can_write and tier.writers.wait_room(until_s - time.monotonic()):
                    self._post(tier, key, until_s)

    def _post(self, tier: Tier, key: PartKey, until_s: float = 0.0) -> None:
        if not tier.known.claim(key):
            return
        borrow = self._lend(key, until_s)
        if borrow is None:
            tier.known.settle(key, is_stored=False)
            tier.counts.add(Count.DROPPED)
            return
        job = Job(partial(self._write, tier, borrow), partial(self._settle, tier, borrow, is_stored=False))
        if not tier.can_write or not tier.writers.post(job):
            job.give_up()

    def _lend(self, key: PartKey, until_s: float) -> Borrow | None:
        """Waits until then for others to be given back."""
        if not self._may_lend.acquire(timeout=max(0.0, until_s - time.monotonic())):
            return None
        borrow = self._host.lend(key)
        if borrow is None:
            self._may_lend.release()
        return borrow

    def _write(self, tier: Tier, borrow: Borrow) -> None:
        self._settle(tier, borrow, is_stored=self._mover.write(tier, borrow.part))

    def _settle(self, tier: Tier, borrow: Borrow, *, is_stored: bool) -> None:
        borrow.give_back()
        self._may_lend.release()
        tier.known.settle(borrow.part.key, is_stored=is_stored)
        if not is_stored:
            tier.counts.add(Count.DROPPED)
