"""What an engine needs of its tiers: the chain of them, and how the KV of its pool becomes records there."""

from __future__ import annotations

from dataclasses import dataclass

from kvrelay_engine.sequence import Sequence
from kvrelay_transfer.tiers.chain import TierChain
from kvrelay_transfer.tiers.kv_records import KvRecords
from kvrelay_transfer.tiers.records import Record


@dataclass(frozen=True, slots=True)
class KvTiers:
    chain: TierChain
    kv: KvRecords

    def record(self, sequence: Sequence, chunk: int) -> Record:
        """Of a chunk whose tokens are all in the sequence's hash chain; its last hash tells of all tokens before."""
        layout, chunk_tokens = self.kv.chunks.layout, self.kv.chunks.chunk_tokens
        last_unit = (chunk + 1) * chunk_tokens // layout.hash_unit_tokens - 1
        return self.kv.record(sequence.chain.unit_hashes[last_unit])
