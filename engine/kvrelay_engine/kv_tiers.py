"""What an engine needs of its tiers: the chain of them, how the KV of its pool becomes records there, and what the
engine's load says of them."""

from __future__ import annotations

from dataclasses import dataclass

from kvrelay_engine.load_messages import TierLoad
from kvrelay_engine.sequence import Sequence
from kvrelay_transfer.tiers.chain import TierChain
from kvrelay_transfer.tiers.kv_records import KvRecords
from kvrelay_transfer.tiers.records import Record
from kvrelay_transfer.tiers.tier_stats import TierStats


@dataclass(frozen=True, slots=True)
class KvTiers:
    chain: TierChain
    kv: KvRecords

    def record(self, sequence: Sequence, chunk: int) -> Record:
        """Of a chunk whose tokens are all in the sequence's hash chain; its last hash tells of all tokens before."""
        layout, chunk_tokens = self.kv.chunks.layout, self.kv.chunks.chunk_tokens
        last_unit = (chunk + 1) * chunk_tokens // layout.hash_unit_tokens - 1
        return self.kv.record(sequence.chain.unit_hashes[last_unit])

    def loads(self) -> tuple[TierLoad, ...]:
        return tuple(map(_load_of, self.chain.stats().tiers))


def _load_of(stats: TierStats) -> TierLoad:
    usage = stats.usage
    return TierLoad(
        tier=stats.name,
        queued=stats.num_queued,
        is_left_alone=stats.is_open,
        times_left_alone=stats.num_openings,
        parts=usage.num_parts,
        used_bytes=usage.used_bytes,
        capacity_bytes=usage.capacity_bytes,
        evicted=usage.num_evicted,
        gb_per_s=stats.gb_per_s,
        **stats.counts,
    )
