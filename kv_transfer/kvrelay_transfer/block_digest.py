"""Digests of blocks: whether what arrived is, to the byte, what was sealed.

Fence words show that a block was not rewritten; a digest also shows that every byte of it came. It costs a pass over
the block on both sides, so a source digests a share of what it seals: all of it in tests, a little in production, where
it tells of broken memory, links or libraries. Knows no tickets and no requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from blake3 import blake3
from msgspec import Struct

if TYPE_CHECKING:
    from kvrelay_transfer.pool_memory import PoolMemory

DIGEST_BYTES = 16


class BlockDigest(Struct, frozen=True, array_like=True):
    """Of a block of a ticket; `block` is the source's number."""

    group: int
    block: int
    digest: bytes


class BlockDigester:
    def __init__(self, memory: PoolMemory, share: float = 0.0) -> None:
        """`share` of the blocks are picked, evenly: of 0.01 every hundredth."""
        self._memory = memory
        self._share = share
        self._credit = 0.0

    def digest(self, block: int) -> bytes:
        """DIGEST_BYTES of the block's bytes as they are now. From a GPU they are copied first."""
        row = self._memory.block_rows[block].cpu().numpy()
        return blake3(row.data).digest(length=DIGEST_BYTES)

    def picks(self) -> bool:
        """Whether the next block is one of the share."""
        self._credit += self._share
        if self._credit < 1.0:
            return False
        self._credit -= 1.0
        return True
