"""KV that was computed here, offered to the tiers a chunk at a time, behind the back of the steps.

Prefill offers prompts, decode what it generates, so that a later turn is found by whoever computes it. What came from
elsewhere - the prefix cache, a hand-off, a tier - was offered by who computed it. An offer costs the step some
dictionary work and pins nothing: the words of the blocks are noted now and compared after the copy (PROTOCOL A7).
"""

from __future__ import annotations

from kvrelay_engine.kv_tiers import KvTiers
from kvrelay_engine.sequence import Sequence


class TierStores:
    def __init__(self, tiers: KvTiers) -> None:
        self._tiers = tiers
        self._chunk_tokens = tiers.kv.chunks.chunk_tokens
        self._chunk_blocks = tiers.kv.chunks.num_blocks

    def sealed(self, sequence: Sequence) -> None:
        """Its computed tokens are sealed, and in its hash chain as far as they fill hash units."""
        num_full = sequence.num_computed // self._chunk_tokens
        if num_full <= sequence.num_offered:
            return  # most steps
        for chunk in range(max(sequence.num_offered, sequence.num_cached // self._chunk_tokens), num_full):
            self._offer(sequence, chunk)
        sequence.num_offered = num_full

    def _offer(self, sequence: Sequence, chunk: int) -> None:
        record = self._tiers.record(sequence, chunk)
        if self._tiers.chain.knows(record):
            return
        first = chunk * self._chunk_blocks
        blocks = sequence.blocks[first : first + self._chunk_blocks]
        self._tiers.chain.offer(record, self._tiers.kv.source(blocks))
