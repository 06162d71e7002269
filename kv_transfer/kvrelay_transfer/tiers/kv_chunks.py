"""How the KV of one group is cut for the tiers: into chunks of tokens, and these into parts by layers.

A chunk's canonical record is `[layers, 2, kv_heads, chunk_tokens, head_dim]`, whatever the block size of the pool that
it comes from or goes to. Pure arithmetic: no memory, no keys.
"""

from __future__ import annotations

from msgspec import Struct

from kvrelay_transfer.layout import ELEMENT_BYTES, KvLayout
from kvrelay_transfer.tiers.records import PART_BYTES

_MAX_CHUNK_TOKENS = 256  # a hit is a whole number of chunks


class KvChunks(Struct, frozen=True):
    layout: KvLayout
    chunk_tokens: int  # a power of two, at least a block and a hash unit
    part_layers: int  # of each part but the last, which may have fewer

    @classmethod
    def of(cls, layout: KvLayout) -> KvChunks:
        """Chunks of about a part, within the bounds."""
        token_bytes = layout.block_bytes // layout.block_tokens
        fitting_tokens = 1 << max(0, (PART_BYTES // token_bytes).bit_length() - 1)
        chunk_tokens = max(layout.hit_tokens, min(_MAX_CHUNK_TOKENS, fitting_tokens))
        layer_bytes = token_bytes * chunk_tokens // layout.num_layers
        return cls(layout, chunk_tokens, max(1, min(layout.num_layers, PART_BYTES // layer_bytes)))

    @property
    def num_blocks(self) -> int:
        """Of the pool, in a chunk."""
        return self.chunk_tokens // self.layout.block_tokens

    @property
    def num_parts(self) -> int:
        return -(-self.layout.num_layers // self.part_layers)

    @property
    def row_bytes(self) -> int:
        """What is contiguous in a block and in a part: the tokens of a block, of one head."""
        return self.layout.block_tokens * self.layout.head_dim * ELEMENT_BYTES[self.layout.dtype]

    def layers(self, part: int) -> tuple[int, int]:
        """[first, end)."""
        return part * self.part_layers, min((part + 1) * self.part_layers, self.layout.num_layers)

    @property
    def part_bytes(self) -> tuple[int, ...]:
        layer_bytes = 2 * self.layout.num_kv_heads * self.num_blocks * self.row_bytes
        return tuple((end - first) * layer_bytes for first, end in map(self.layers, range(self.num_parts)))
