"""Host memory on top of tiers: where an engine loads records from, and offers those that it computed.

Nothing of a tier runs on the engine's thread but dictionary lookups and posting to queues. A tier that is slow, down,
full or lying is a miss. Records in, records out: it knows no models, blocks or requests.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvrelay_core.clock import Clock, MonotonicClock
from kvrelay_transfer.tiers.codec import Codec
from kvrelay_transfer.tiers.fetch import Fetch, FetchLimits, IsWorth, TakeRoom
from kvrelay_transfer.tiers.gatherer import Gatherer
from kvrelay_transfer.tiers.host_store import HostStore
from kvrelay_transfer.tiers.part_mover import PartMover
from kvrelay_transfer.tiers.records import Record, RecordSource
from kvrelay_transfer.tiers.tier import Tier
from kvrelay_transfer.tiers.tier_stack import HostTier, TierStack
from kvrelay_transfer.tiers.tier_stats import ChainStats
from kvrelay_transfer.tiers.write_down import WriteDown


class TierChain:
    """Thread-safe. The stores are the chain's from now on."""

    def __init__(
        self,
        host: HostStore,
        tiers: Sequence[Tier] = (),
        *,
        codec: Codec | None = None,
        secret: bytes = b"",
        clock: Clock | None = None,
        limits: FetchLimits | None = None,
        max_offers: int = 256,
    ) -> None:
        """`tiers` fastest first. `codec` and `secret` are those that the namespaces of the records' keys tell of.
        `max_offers` wait to be copied out of the pool."""
        clock = clock or MonotonicClock()
        mover = PartMover(host, codec=codec, secret=secret)
        write_down = WriteDown(host, tuple(tiers), mover)
        self._stack = TierStack(HostTier(host, clock, max_offers=max_offers), tuple(tiers), mover, write_down, clock)
        self._gatherer = Gatherer(self._stack)
        self._limits = limits or FetchLimits()

    def fetch(self, records: Sequence[Record], take_room: TakeRoom, until_s: float, is_worth: IsWorth) -> Fetch:
        """Records that depend on each other in this order: only the first ones count.

        `take_room(first, end)` gives destinations for records [first, end), or None: there is no room, and the fetch
        ends there. `is_worth(num_records, seconds)` says whether loading so many in about so many seconds beats
        computing them. Both are called in `Fetch.poll`. `until_s` is a time of the chain's clock.
        """
        return Fetch(self._stack, records, take_room, until_s, is_worth, self._limits)

    def offer(self, record: Record, source: RecordSource) -> bool:
        """Never blocks. False: it is dropped, since too much waits already, or known."""
        return self._gatherer.offer(record, source)

    def knows(self, record: Record) -> bool:
        """Whether it is stored or being stored, as far as this process knows."""
        return self._gatherer.knows(record)

    def drain(self, timeout_s: float) -> bool:
        """Waits until all that was offered is in the tiers below; False when that takes longer. For a last goodbye:
        what only host memory has is written, too."""
        until_s = time.monotonic() + timeout_s
        is_done = self._stack.host.writers.wait_idle(timeout_s)
        self._stack.write_down.write_all(until_s)
        waits = [tier.writers.wait_idle(max(0.0, until_s - time.monotonic())) for tier in self._stack.tiers]
        return is_done and all(waits)

    def stats(self) -> ChainStats:
        return ChainStats((self._stack.host.stats(), *(tier.stats() for tier in self._stack.tiers)))

    def close(self, timeout_s: float = 5.0) -> None:
        """What waits is given up, fetches end. Threads that still hang in a store then are left behind. Idempotent."""
        host = self._stack.host
        for tier in self._stack.tiers:
            tier.stop()
        host.readers.stop()
        host.writers.stop()
        until_s = time.monotonic() + timeout_s
        for end in (*(tier.join for tier in self._stack.tiers), host.readers.join, host.writers.join):
            end(max(0.0, until_s - time.monotonic()))
        host.store.close()
