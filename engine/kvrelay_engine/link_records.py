"""What is known of each link: its probed speed, its floor, its counts. A record outlives its link: what was left, or
lost, and is connected again goes on counting, until the peer starts anew or is gone for long. Knows no links.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from kvrelay_core.clock import Clock
from kvrelay_engine.load_messages import ConnectorLoad, LinkLoad
from kvrelay_engine.transfer_stats import TransferStats
from kvrelay_transfer.connectors.base import LinkSpeed
from kvrelay_transfer.connectors.link_floors import Floor, floor_of

log = logging.getLogger(__name__)

# From how many bytes on the speed of reads tells something, where nothing was probed.
ENOUGH_BYTES = 64 << 20


@dataclass(slots=True, eq=False)
class LinkRecord:
    peer_id: str
    connector: str
    floor: Floor
    counts: TransferStats  # of this link
    stats: tuple[TransferStats, ...]  # all that its reads count in
    speed: LinkSpeed | None = None  # of the probe; None while it runs
    is_judged: bool = False
    is_below_floor: bool = False

    def judge(self, speed: LinkSpeed | None) -> None:
        """`speed` is what the probe says now. Warns once; without a probe the first reads are what is judged."""
        self.speed = speed
        if self.is_judged or speed is None:
            return
        if not speed.gb_per_s and self.counts.size_bytes < ENOUGH_BYTES:
            return
        gb_per_s = speed.gb_per_s or self.counts.gb_per_s
        self.is_judged = True
        self.is_below_floor = gb_per_s < self.floor.gb_per_s
        if self.is_below_floor:
            log.warning(
                "%s from %s moves %.2f GB/s, where %g would be little; look for: %s",
                self.connector, self.peer_id, gb_per_s, self.floor.gb_per_s, self.floor.look_for,
            )  # fmt: skip

    def load(self, *, is_current: bool) -> LinkLoad:
        speed = self.speed or LinkSpeed()
        return LinkLoad(
            peer_id=self.peer_id, connector=self.connector, is_current=is_current, probed_gb_per_s=speed.gb_per_s,
            probed_latency_s=speed.latency_s, floor_gb_per_s=self.floor.gb_per_s, is_below_floor=self.is_below_floor,
            counts=self.counts.counts(),
        )  # fmt: skip


class LinkRecords:
    def __init__(self, clock: Clock, device: str) -> None:
        """`device` is the kind that our pool is on."""
        self._clock = clock
        self._device = device
        self._records: dict[tuple[str, str], LinkRecord] = {}
        self._totals: defaultdict[str, TransferStats] = defaultdict(lambda: TransferStats(clock))

    def find(self, peer_id: str, connector: str) -> LinkRecord:
        """Makes it, if there is none yet."""
        key = (peer_id, connector)
        if key not in self._records:
            counts = TransferStats(self._clock)
            stats = (counts, self._totals[connector])
            self._records[key] = LinkRecord(peer_id, connector, floor_of(connector, self._device), counts, stats)
        return self._records[key]

    def forget(self, peer_id: str) -> None:
        """The totals keep what was counted."""
        self._records = {key: record for key, record in self._records.items() if record.peer_id != peer_id}

    def note_stale(self, peer_id: str, connector: str) -> None:
        for counts in self._stats(peer_id, connector):
            counts.stale_reads += 1

    def note_fallback(self, peer_id: str, connector: str) -> None:
        """The pair has left `connector` for another one."""
        for counts in self._stats(peer_id, connector):
            counts.fallbacks += 1

    def _stats(self, peer_id: str, connector: str) -> tuple[TransferStats, ...]:
        """Of a peer that has gone, the totals only."""
        record = self._records.get((peer_id, connector))
        return (self._totals[connector],) if record is None else record.stats

    def links(self, current: Mapping[str, str]) -> tuple[LinkLoad, ...]:
        """`current` names the connector of each peer that is connected; of others nothing is said."""
        return tuple(
            record.load(is_current=current[record.peer_id] == record.connector)
            for record in self._records.values()
            if record.peer_id in current
        )

    def totals(self) -> tuple[ConnectorLoad, ...]:
        return tuple(ConnectorLoad(connector=name, counts=stats.counts()) for name, stats in self._totals.items())
